// Package vhostuser is the HPDI driver for block devices that another process serves by
// the vhost-user protocol: a virtio-blk driver in user space, for any back-end.
//
//	d, err := vhostuser.Open(ctx, "/run/disk.sock", vhostuser.Options{Queues: 4, Reconnect: time.Minute})
//
// Requests go through virtqueues in memory that both processes have mapped. Descriptors
// point at the application's own memory, so nothing is copied between it and the
// back-end; a request costs no system call where the other side looks by itself, and else
// one to say that there is something.
//
// # Memory
//
// The back-end maps the memory that requests use, so it must come from hpdi.Alloc:
// Info.SharedMemory is set, and a request with a vector elsewhere ends with
// hpdi.ErrMemory. A mapping is given to the back-end by Register or at its first use, and
// taken away when no Register of it is left or it is freed. A back-end takes at least 7
// mappings, and more where it says so: allocate few and large ones. The back-end can read
// and write all of a mapping at any time, not only during requests.
//
// # Reconnecting
//
// When the connection ends, the driver makes another one, for up to Options.Reconnect,
// and the application only waits. A back-end that keeps a record of what it has in flight
// (PInflightSHMFD) gets that record and the queues as they are, and goes on where the
// other one ended; Pollux's guests do each request exactly once then. For one that keeps
// none, qemu-storage-daemon among them, the driver sends everything that has not been
// completed once more, in its order:
//
//   - Nothing is lost that only lay in a queue, and nothing hangs.
//   - A request may have been done and is done again. That is harmless unless requests
//     that overlap were in flight together, or somebody else writes to the device.
//   - What was completed but not flushed is lost if the back-end had it in its own
//     memory only.
//   - A kernel that still works at a request of a back-end that was killed may change the
//     device or the memory of a read after the request was done again. Pollux's guests
//     are fenced before another one answers; elsewhere the operator must know.
//
// When the time is over, what is in flight fails with hpdi.ErrDisconnected, and what is
// submitted then does at once; all is well again when there is a connection.
//
// # Cancelling
//
// Virtio has no way to take a request back, so Cancel and deadlines reach what has not
// been put into a queue yet: because that is full, or because there is no back-end. While
// there is none they reach what was in the queue, too, if the back-end keeps no record.
//
// # What a back-end may not do
//
// Everything that comes from it is checked: sizes of messages, descriptors, features, the
// configuration, and each word of a virtqueue (see internal/virtio). A chain that is not
// in flight, or comes twice, or more bytes than there was room for, end the device: what
// is in flight and all that follows fails with an error that says what it was. A back-end
// cannot make the driver touch memory outside of the queues, nor cut the shared memory
// off, which is sealed.
//
// # Locks
//
// device.mu guards connection and memory table, and is taken before vring.mu, which
// guards a virtqueue and all queues of the application on it. Neither is held while the
// application sleeps. device.mu is while the back-end answers a message, for up to
// Options.Timeout, and while it brings the device up, for twice that at most and no longer
// than requests wait for it: so long may a call take that needs it, which are NewQueue, the
// Close of device and queues, Register, Unregister, and a Submit with memory that is new.
package vhostuser
