// Package ring serves a volume over rings in shared memory (internal/ring): to
// applications that use hpdi/ring, and to a process of the host that passes on what
// virtual machines ask for, where a guest cannot map their memory itself.
//
// # The way of a request
//
// Each queue of a ring has a goroutine. It takes what is there and does at once what
// needs no device (TryRead, TryStage with TryCommit), with one copy between the memory of
// the front-end and that of the volume; it answers all of a batch with one word, and with
// one awakening at most. What may have to wait goes to workers of the queue, up to a bound,
// so that a slow device holds up nobody who needs none.
//
// The memory of a front-end may change at any time. The payload of a write is copied to
// the log before its checksum is made. What comes from a device is compared with its
// checksum in memory of our own, and copied then: else a front-end that writes to a
// buffer while it is read into would look like a disk that decays.
//
// # Exactly once
//
// A ring has a session of its volume, with as many queues and slots. Writes, trims and
// zeroes carry the tag of their submission into the log, and are there wholly and with it,
// or not at all. A guest that finds requests in a ring which an earlier one has left asks
// for each whether its tag is known: then it is completed without being run again. They
// are run before anything newer, in the order of their submission, and one after the other.
// Where the session was forgotten meanwhile nobody can tell, and they are run again.
//
// The session ends with a front-end that says good-bye. One that just disappears leaves
// it, for its ring may come back.
package ring
