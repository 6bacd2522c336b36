// Package vhostuser serves one block volume as the disk of virtual machines: the back-end
// of vhost-user-blk, as QEMU's docs/interop/vhost-user.rst and section 5.2 of VIRTIO 1.2
// define it. docs/vhost-user.md says what is offered, feature by feature.
//
// # The way of a request
//
// A connection has one goroutine that answers its messages, and each of its queues has one
// that takes requests from the ring. That does at once what the volume can do from memory
// (TryRead, TryStage with TryCommit), many in one batch with one notice to the driver, and
// gives the rest to workers of the connection, whose number is bounded: so a slow device
// does not stop hits of the same queue. A worker completes what it has done under the
// queue's lock. A queue without requests looks for a short time (internal/spin), with
// notices switched off, then asks for notices and sleeps in the runtime's poller.
//
// The payload of a write goes from the machine's memory into memory of the operation log,
// that of a read from the cache into the machine's memory, one copy each. What comes from
// a device is read into memory of our own first: it is compared with its checksum, and
// other copies may be repaired with it, and the machine could change it in between.
//
// # The front-end is a stranger
//
// Of what it shares, each word is read once and checked (internal/virtio). Memory must be
// a file of tmpfs or of hugetlbfs: a page of another file system may never come, and whoever
// waits for it cannot be woken. A file that becomes shorter is a fault of the goroutine that
// touches it, which ends the connection ([runtime/debug.SetPanicOnFault]); no lock of the
// volume is held across such memory unless the file is sealed against that, else a private
// buffer is between. A descriptor that is to wake somebody must be an eventfd. What breaks
// a rule ends the connection, with a message that names queue, descriptor and rule; other
// connections do not notice.
//
// # A back-end that dies
//
// With the feature that says so, each request is in the in-flight area from before it is
// looked at until after its completion is in the ring (internal/vhost). The area is the
// front-end's, and comes back with its next connection, to whichever guest; the session
// that it names tells which changes are in the operation log already. The order is
//
//	entry in the area -> record with its tag published -> used ring -> entry cleared
//
// and whoever comes next, for each entry in the order of its counter: asks the session;
// completes without running what is logged; runs the rest again. A change whose fate
// nobody knows, because the session was forgotten, ends with an error: to run it again
// could undo a later one.
//
// The steps from an entry's completion to its clearing are a step machine (completion), so that a test
// ends a back-end between any two stores.
//
// # A volume that goes away
//
// When the volume says that it was closed or lost to a higher epoch, a request that hears
// that is not completed: the connection is cut, and what workers end later is not completed
// either. The driver waits, and the next guest finds the requests in the area. The same
// holds for a connection whose front-end gives its area to another one: it is cut, and has
// ended before the other one looks at the area.
//
// # Locks
//
// Server.mu guards the list of connections, and which of them has which area. queue.mu guards the ring, what is tracked, and
// the number of requests under way; it is never held across a call that may wait, except
// a write to an eventfd, which a hostile front-end can make wait: whoever ends the queue
// empties that eventfd when it is full, until the writer is through. queue.closing and pool.mu are leaves.
package vhostuser
