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
// socket, and taken before link.mu. queue.mu is a leaf under both.
package nbd
