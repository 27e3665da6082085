// MQTT.js as a client of a broker: node roundtrip.js PORT VERSION (4 or 5). Prints "ok", or fails.
'use strict'
const assert = require('node:assert')
const mqtt = require('mqtt')

const port = Number(process.argv[2])
const version = Number(process.argv[3])
const v5 = version === 5
const COUNT = 500
const base = `js/${process.pid}`

const connect = (options = {}) =>
  mqtt.connectAsync(`mqtt://127.0.0.1:${port}`, { protocolVersion: version, reconnectPeriod: 0, ...options })

// Collects messages; `take(n)` resolves with the next n.
function collect (client) {
  const have = []
  let wake = () => {}
  client.on('message', (topic, payload, packet) => {
    have.push({ topic, payload: payload.toString(), packet })
    wake()
  })
  return async count => {
    while (have.length < count) await new Promise(resolve => { wake = resolve })
    return have.splice(0, count)
  }
}

async function everyQos () {
  const client = await connect()
  const take = collect(client)
  await client.subscribeAsync(`${base}/qos/+`, { qos: 2 })
  for (const qos of [0, 1, 2]) {
    const topic = `${base}/qos/${qos}`
    for (let n = 0; n < COUNT; n += 10) { // MQTT.js does not mind the server's Receive Maximum: stay below
      await Promise.all(Array.from({ length: 10 }, (_, k) => client.publishAsync(topic, `${n + k}`, { qos })))
    }
    const got = await take(COUNT)
    assert.deepStrictEqual(got.map(m => m.payload), Array.from({ length: COUNT }, (_, n) => `${n}`))
    assert(got.every(m => m.packet.qos === qos && m.topic === topic))
  }
  await client.unsubscribeAsync(`${base}/qos/+`)
  await client.endAsync()
}

async function retainedAndWill () {
  const watcher = await connect()
  const take = collect(watcher)
  const will = { topic: `${base}/will`, payload: Buffer.from('gone'), qos: 1, retain: false }
  const mortal = await connect({ will })
  await mortal.publishAsync(`${base}/kept`, 'retained', { qos: 1, retain: true })
  await watcher.subscribeAsync(`${base}/kept`, { qos: 1 })
  const [kept] = await take(1)
  assert.strictEqual(kept.payload, 'retained')
  assert(kept.packet.retain)
  await watcher.subscribeAsync(`${base}/will`, { qos: 1 })
  mortal.stream.destroy()
  assert.strictEqual((await take(1))[0].payload, 'gone')
  await watcher.publishAsync(`${base}/kept`, '', { qos: 1, retain: true })
  await watcher.endAsync()
}

async function session () {
  const options = { clientId: `js-${process.pid}-${version}`, clean: false }
  if (v5) options.properties = { sessionExpiryInterval: 300 }
  const first = await connect(options)
  await first.subscribeAsync(`${base}/session`, { qos: 1 })
  await first.endAsync()
  const sender = await connect()
  for (let n = 0; n < 50; n++) await sender.publishAsync(`${base}/session`, `${n}`, { qos: 1 })
  await sender.endAsync()
  const second = mqtt.connect(`mqtt://127.0.0.1:${port}`, { protocolVersion: version, reconnectPeriod: 0, ...options })
  const take = collect(second)
  const present = new Promise(resolve => second.on('connect', packet => resolve(packet.sessionPresent)))
  const got = await take(50)
  assert.deepStrictEqual(got.map(m => m.payload), Array.from({ length: 50 }, (_, n) => `${n}`))
  assert.strictEqual(await present, true)
  await second.endAsync()
}

async function properties () {
  const client = await connect({ properties: { topicAliasMaximum: 5, receiveMaximum: 10 } })
  const take = collect(client)
  await client.subscribeAsync(`${base}/properties`, { qos: 1, properties: { subscriptionIdentifier: 7 } })
  await client.publishAsync(`${base}/properties`, 'x', {
    qos: 1,
    properties: {
      contentType: 'text/plain',
      responseTopic: `${base}/answer`,
      correlationData: Buffer.from([0, 1, 255]),
      messageExpiryInterval: 60,
      userProperties: { site: ['a', 'b'] }
    }
  })
  const [{ packet }] = await take(1)
  assert.strictEqual(packet.properties.contentType, 'text/plain')
  assert.strictEqual(packet.properties.responseTopic, `${base}/answer`)
  assert.deepStrictEqual([...packet.properties.correlationData], [0, 1, 255])
  assert.deepStrictEqual(packet.properties.userProperties.site, ['a', 'b'])
  assert.strictEqual(packet.properties.subscriptionIdentifier, 7)
  await client.endAsync()
}

async function shared () {
  const members = await Promise.all([connect(), connect()])
  let total = 0
  const done = new Promise(resolve => {
    for (const member of members) {
      member.on('message', () => { if (++total === 100) resolve() })
    }
  })
  for (const member of members) await member.subscribeAsync(`$share/group/${base}/shared`, { qos: 1 })
  const sender = await connect()
  for (let n = 0; n < 100; n++) await sender.publishAsync(`${base}/shared`, `${n}`, { qos: 1 })
  await done
  await Promise.all([...members, sender].map(client => client.endAsync()))
  assert.strictEqual(total, 100)
}

async function main () {
  await everyQos()
  await retainedAndWill()
  await session()
  if (v5) {
    await properties()
    await shared()
  }
  console.log('ok')
}

const limit = setTimeout(() => { console.error('not done in 60 s'); process.exit(1) }, 60000)
main().then(() => clearTimeout(limit), error => { console.error(error); process.exit(1) })
