package block

import "context"

// SessionID names a session. It is random and never 0.
type SessionID uint64

// Tag names one submission of a request by a client that sends requests again after its
// server has died. The zero Tag means none.
type Tag struct {
	Session SessionID
	Queue   uint16 // of the session's queues, from 0
	Slot    uint16 // of the queue's slots, from 0
	Counter uint64 // of the submission, from 1; never used again in its slot
}

// Session is what a volume knows of a client that sends requests again: of each
// slot, the last submission whose change is in the operation log. A slot holds one
// request at a time. Its methods may be called concurrently.
//
//	submit -> change and tag in the log, atomically -> completion -> slot is used again
//
// A guest may die between any two of these. The tag outlives its consistency point, and is
// known to whoever opens the pool next, until the slot's next change is logged or the
// session is closed.
type Session interface {
	// Fresh reports whether OpenSession made the session: nothing is known of requests
	// that were submitted before. A client that has some in flight had its session
	// forgotten, because its volume was deleted, the pool was closed in good order, or
	// the memory that sessions are in was lost, damaged or given to others.
	Fresh() bool
	// Done reports whether the change of that submission is in the log, or was: then it
	// is to be completed without being run again. Of a request that changes nothing it
	// is always false. The error is ErrCorrupt when what is known of the slot was
	// damaged in memory: then nobody can tell, and the request is to end with an error;
	// ErrInvalid for a slot that the session does not have; ErrClosed when the pool is
	// closed, or the session.
	Done(queue, slot int, counter uint64) (bool, error)
	// Close ends the session of a client that has ended with nothing in flight, and
	// forgets all its tags.
	Close()
	// Leave says that the client's connection is gone. The session stays, for OpenSession
	// to find again. Where memory for sessions is short those of the same volume are
	// forgotten first, and of them the one that was left first.
	Leave()
}

// Sessions is the part of a Volume that keeps sessions.
type Sessions interface {
	// OpenSession finds the session of that number, after a takeover, a restart or a
	// reconnection, or makes it, with so many queues of so many slots each. It may be
	// open already: who opens it last is as good as who did first. ErrInvalid is a
	// session of another volume or shape, or of more slots than a volume may have together,
	// ErrNoSpace that there is no memory for it, or that the volume has its share,
	// ErrUnsupported a volume that keeps none.
	OpenSession(ctx context.Context, id SessionID, queues, slots int) (Session, error)
}
