// Package nbd is the HPDI driver for network block devices: a client of any server of the
// NBD protocol.
//
//	d, err := nbd.Open(ctx, "nbd://host:10809/disk", nbd.Options{Reconnect: time.Minute})
//
// Payload is not copied: what is written goes from the application's vectors to the socket,
// and what is read comes from the socket into them. Around it a queue costs one system call
// a batch that it submits, and one or two a reply.
//
// # Connections
//
// A device has one connection, or several where the server says that a flush on one of them
// covers the writes of all. Each queue uses one of them, in turn. For each there is one
// goroutine, which reads replies and, when the connection has ended, makes another one. Who
// submits writes to the socket himself.
//
// # Reconnecting
//
// With Options.Reconnect a connection that has ended is made again, and what was under way
// is sent again: nothing is lost, and the application only waits. Three things it must know:
//
//   - A server that died with writes that it had completed, and no flush had covered, may have
//     lost them. It is as with a disk that lost power, only that nobody is told. Pollux's
//     guests keep what they have acknowledged.
//   - A server that still works at a request of the connection that has ended may change the
//     device after the request that took its place has completed, and then undo a later one.
//     Pollux's guests are fenced before another one answers; elsewhere the operator of the
//     server must know.
//   - An export that has become smaller, or read-only, or cannot do any more what the device
//     was said to be able to do, is not the same device: requests fail then.
//
// # Giving up
//
// NBD cannot take a command back. A request that is cancelled, or whose deadline passes, is
// given up: it completes at once, and the reply that comes later is read and thrown away, also
// the rest of a payload of which a part had come. A write of which the payload is being sent
// completes when that has left. The server has a second for that, or until the deadline: then
// it loses the connection. So it does when it has not read what is being sent and requests with
// a deadline wait behind that, also those of another queue on the same connection. What is given up before it was sent, or while there is
// no connection, is never sent.
//
// A server may still carry out a write, discard or write of zeroes that was given up. As long
// as it has not answered, and the connection lasts, what changes the same bytes is held back,
// on all connections of the device, so that nothing is undone by what came before it. Other
// programs and devices are not held back: who gives a write up keeps them off its bytes until a
// later write of them has completed.
//
// # Block status
//
// Where the server has structured replies and the context base:allocation, a device tells holes
// and zeroes from data. A block in which a border lies is data.
//
// # What a server may not do
//
// Everything that comes from a server is checked: a reply to a request that is not under way,
// data outside of its range, less or more than was asked for, chunks that do not end. Any of
// them ends the connection with an error that says what it was. Memory is written to only
// within the vectors of a request that is under way.
//
// # Locks
//
// link.mu guards what is under way; link.wmu is held while something is written to the
// socket, and taken before link.mu. queue.mu and ghosts.mu are leaves under both.
package nbd
