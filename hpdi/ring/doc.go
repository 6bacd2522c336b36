// Package ring is the HPDI driver for rings in shared memory: the application's side
// ([Open]), and a back-end that serves any device to such applications ([Server]). Pollux guests
// serve volumes in this way, too.
//
//	d, err := ring.Open(ctx, "/run/pollux/vm1.ring", ring.Options{Queues: 4})
//
// Requests are put into memory that both sides map, and answered there. While both sides are
// busy neither makes a system call; while nothing is to be done both sleep. In between each
// looks for a while before it sleeps, as long as that pays (Options.Poll).
//
// # Memory
//
// Payload stays where it is: requests carry places in memory that the back-end has mapped as
// well. It is handed over by descriptor when a request uses it first, or by Register, and must
// therefore come from hpdi.Alloc; other memory is refused with hpdi.ErrMemory. Few large pieces
// are better than many small ones: at most 1023 can be shared at once.
//
// # Death of the back-end
//
// Requests in flight stay in the ring. The driver looks for a back-end at the same socket
// (Options.Reconnect), which finds what the last one has left and runs it before anything
// newer; the application notices a pause. Volumes of Pollux do each change once. Other devices may
// have done a request before the back-end died, and do it again then. That shows only where an
// application has two requests on one place in flight, which have no order anyhow.
//
// While no back-end is there, cancelled requests and those whose deadlines pass come back at
// once, and no later back-end runs them. What a back-end that was killed had given to its kernel
// may still end after that, some milliseconds later: an application that cares waits for
// the next back-end before it uses the memory of a read that it has cancelled.
//
// # Without a socket
//
// Where no descriptor can be handed over, as between two virtual machines, the path is that of a
// file or device that both map (a file on a memory file system, /dev/dax0.0, the resource of an
// ivshmem device). Then the memory of requests lies in the ring, and comes from the device
// itself, which is an [Allocator]; there is no event descriptor; a side that has slept is up
// to 2 ms late; and cancelled requests end only when there is a back-end. The file must keep its
// size. Whoever starts the two sides between machines must see to it that a back-end that was
// replaced does not wake up again.
package ring
