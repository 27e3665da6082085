// MQTT.js over WebSocket as a client of a broker: node ws_roundtrip.js URL VERSION (4 or 5) [CA-FILE [USERNAME PASSWORD]].
// Prints "ok", or fails. SIZES in the environment are those of its messages.
'use strict'
const assert = require('node:assert')
const fs = require('node:fs')
const mqtt = require('mqtt')

const [url, version, ca, username, password] = process.argv.slice(2)
const COUNT = 40
const sizes = (process.env.SIZES || '0,1,90,100,125,126,127,65400,65535,65536,70000,900000').split(',').map(Number)
const base = `js/ws/${process.pid}`

const connect = (options = {}) => mqtt.connectAsync(url, {
  protocolVersion: Number(version),
  reconnectPeriod: 0,
  username,
  password,
  ca: ca ? fs.readFileSync(ca) : undefined,
  ...options
})

// Collects messages; `take(n)` resolves with the next n.
function collect (client) {
  const have = []
  let wake = () => {}
  client.on('message', (topic, payload, packet) => {
    have.push({ topic, payload, packet })
    wake()
  })
  return async count => {
    while (have.length < count) await new Promise(resolve => { wake = resolve })
    return have.splice(0, count)
  }
}

async function everyQos () {
  const reader = await connect()
  const writer = await connect()
  const take = collect(reader)
  await reader.subscribeAsync(`${base}/qos/+`, { qos: 2 })
  for (const qos of [0, 1, 2]) {
    const topic = `${base}/qos/${qos}`
    for (let n = 0; n < COUNT; n += 20) { // MQTT.js does not mind the server's Receive Maximum: stay below
      await Promise.all(Array.from({ length: 20 }, (_, k) => writer.publishAsync(topic, `${n + k}`, { qos })))
    }
    const got = await take(COUNT)
    assert.deepStrictEqual(got.map(m => m.payload.toString()), Array.from({ length: COUNT }, (_, n) => `${n}`))
    assert(got.every(m => m.packet.qos === qos && m.topic === topic))
  }
  await writer.endAsync()
  await reader.endAsync()
}

async function everySize () { // around the borders of WebSocket's length fields, and many times a TCP segment
  const client = await connect()
  const take = collect(client)
  await client.subscribeAsync(`${base}/size`, { qos: 1 })
  const payloads = sizes.map(size => Buffer.alloc(size, size % 251))
  await Promise.all(payloads.map(payload => client.publishAsync(`${base}/size`, payload, { qos: 1 })))
  const got = await take(sizes.length)
  assert(got.every((m, n) => m.payload.equals(payloads[n])))
  await client.endAsync()
}

async function will () {
  const watcher = await connect()
  const take = collect(watcher)
  await watcher.subscribeAsync(`${base}/will`, { qos: 1 })
  const mortal = await connect({ will: { topic: `${base}/will`, payload: Buffer.from('gone'), qos: 1, retain: false } })
  mortal.stream.destroy()
  assert.strictEqual((await take(1))[0].payload.toString(), 'gone')
  await watcher.endAsync()
}

async function main () {
  await everyQos()
  await everySize()
  await will()
  console.log('ok')
}

const limit = setTimeout(() => { console.error('not done in 60 s'); process.exit(1) }, 60000)
main().then(() => clearTimeout(limit), error => { console.error(error); process.exit(1) })
