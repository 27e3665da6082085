// The broker aedes (MQTT 3.1.1) over WebSocket: node aedes_ws.js [CERTIFICATE KEY]. Prints its port on 127.0.0.1; ends with
// its standard input.
'use strict'
const fs = require('node:fs')
const http = require('node:http')
const https = require('node:https')
const { WebSocketServer, createWebSocketStream } = require('ws')

async function main () {
  const { Aedes } = await import('aedes')
  const broker = await Aedes.createBroker()
  const [certificate, key] = process.argv.slice(2)
  const server = certificate
    ? https.createServer({ cert: fs.readFileSync(certificate), key: fs.readFileSync(key) })
    : http.createServer()
  const sockets = new WebSocketServer({ server, path: '/mqtt', handleProtocols: names => names.has('mqtt') && 'mqtt' })
  sockets.on('connection', (socket, request) => {
    const stream = createWebSocketStream(socket)
    stream.on('error', () => {}) // a client that vanishes; aedes notices
    broker.handle(stream, request)
  })
  server.listen(0, '127.0.0.1', () => console.log(server.address().port))
}

process.stdin.on('end', () => process.exit(0)).resume()
main().catch(error => { console.error(error); process.exit(1) })
