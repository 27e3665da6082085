// MQTT.js over WebSocket until the broker goes: node ws_client.js URL VERSION (4 or 5) [CA-FILE]. It offers compression, counts
// frames, floods, and waits for a keepalive and a WebSocket ping. Prints a line of JSON when it is done, and one when it is closed.
'use strict'
const assert = require('node:assert')
const fs = require('node:fs')
const mqtt = require('mqtt')
const WebSocket = require('ws')

const [url, version, ca] = process.argv.slice(2)
const COUNT = 5000
const topic = `js/ws/${process.pid}`
const seen = { sent: 0, packets: 0 }
const happened = { ping: null, pingresp: null }

const once = name => new Promise(resolve => { happened[name] = resolve })

async function main () {
  const pinged = once('ping')
  const answered = once('pingresp')
  let socket
  const client = mqtt.connect(url, {
    protocolVersion: Number(version),
    reconnectPeriod: 0,
    keepalive: 1,
    createWebsocket: (address, protocols, options) => {
      socket = new WebSocket(address, protocols, { perMessageDeflate: true, ca: ca ? fs.readFileSync(ca) : undefined })
      socket.on('ping', () => happened.ping())
      const send = socket.send
      socket.send = function (...given) { seen.sent++; return send.apply(this, given) }
      return socket
    }
  })
  let disconnected = null
  client.on('disconnect', packet => { disconnected = packet.reasonCode })
  client.on('packetsend', () => seen.packets++)
  client.on('packetreceive', packet => { if (packet.cmd === 'pingresp') happened.pingresp() })
  await new Promise((resolve, reject) => client.once('connect', resolve).once('error', reject))

  const got = []
  const all = new Promise(resolve => client.on('message', (_, payload) => { if (got.push(payload) === COUNT + 1) resolve() }))
  await client.subscribeAsync(topic, { qos: 2 })
  const big = Buffer.alloc(1000000, 'big')
  await client.publishAsync(topic, big, { qos: 2 })
  for (let n = 0; n < COUNT; n += 500) { // MQTT.js does not mind the server's Receive Maximum: stay below
    await Promise.all(Array.from({ length: 500 }, (_, k) => client.publishAsync(topic, `${n + k}`, { qos: 1 })))
  }
  await all
  assert(got[0].equals(big))
  assert.deepStrictEqual(got.slice(1).map(String), Array.from({ length: COUNT }, (_, n) => `${n}`))
  await Promise.all([pinged, answered])
  console.log(JSON.stringify({ ...seen, extensions: socket.extensions, protocol: socket.protocol }))
  const code = await new Promise(resolve => socket.on('close', resolve))
  console.log(JSON.stringify({ code, disconnected }))
}

const limit = setTimeout(() => { console.error('not done in 60 s'); process.exit(1) }, 60000)
main().then(() => process.exit(0), error => { console.error(error); process.exit(1) }).finally(() => clearTimeout(limit))
