// A peer of the share network that is not written in Python: js-libp2p. It joins the topic, counts shares, and speaks
// one round of the sync protocol. Usage: node peer.mjs MULTIADDR NETWORK_ID SECONDS; prints one JSON object.
Promise.withResolvers ??= function () {  // Node 20 has it not yet, and the libraries ask for it
  let resolve, reject
  const promise = new Promise((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { gossipsub } = await import('@libp2p/gossipsub')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const [address, networkId, seconds] = process.argv.slice(2)
const topic = `/p2pool/${networkId}/shares/1`
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { pubsub: gossipsub(), identify: identify(), ping: ping() },
})
const result = { messages: 0, shareBytes: 0, firstShare: null, status: null, hashes: null, shares: null, errors: [] }
node.services.pubsub.addEventListener('message', (event) => {
  if (event.detail.topic !== topic) return
  result.messages += 1
  result.shareBytes += event.detail.data.length
  result.firstShare ??= Buffer.from(event.detail.data).toString('hex').slice(0, 40)
})
node.services.pubsub.subscribe(topic)
await node.start()
const connection = await node.dial(multiaddr(address))

// One request and its answer: an unsigned varint, then so many bytes of CBOR.
const varint = (length) => {
  const bytes = []
  for (; length > 127; length >>>= 7) bytes.push((length & 127) | 128)
  return Uint8Array.from([...bytes, length])
}
async function ask (stream, payload, reader) {
  stream.send(Buffer.concat([varint(payload.length), payload]))
  let held = Buffer.alloc(0)
  for (;;) {
    for (let shift = 0, length = 0, at = 0; at < held.length; at++, shift += 7) {
      length += (held[at] & 127) * 2 ** shift
      if (held[at] < 128) {
        if (held.length >= at + 1 + length) return held.subarray(at + 1, at + 1 + length)
        break
      }
    }
    const { value, done } = await reader.next()
    if (done) throw new Error('the stream ended')
    held = Buffer.concat([held, value.subarray ? value.subarray() : value])
  }
}
try {
  const stream = await connection.newStream(`/p2pool/${networkId}/sync/1`)
  const reader = stream[Symbol.asyncIterator]()
  const zero = '5820' + '00'.repeat(32)
  const answer = await ask(stream, Buffer.from(`8901` + `00${zero}0000` + `00${zero}00` + '696a732d6c6962703270', 'hex'), reader)
  result.status = answer.toString('hex')
  const located = await ask(stream, Buffer.from('83010a80', 'hex'), reader)
  result.hashes = (located.length - 5) / 34 | 0
  const first = located.indexOf(Buffer.from([0x58, 0x20]))
  const wanted = Buffer.concat([Buffer.from('83011481', 'hex'), located.subarray(first, first + 34)])
  result.shares = (await ask(stream, wanted, reader)).length
} catch (error) {
  result.errors.push(String(error))
}
await new Promise((resolve) => setTimeout(resolve, Number(seconds) * 1000))
result.mesh = node.services.pubsub.getMeshPeers(topic).length
result.subscribers = node.services.pubsub.getSubscribers(topic).length
const rtt = await node.services.ping.ping(connection.remotePeer).catch((error) => String(error))
result.ping = rtt
console.log(JSON.stringify(result))
await node.stop()
process.exit(0)
