package stack

// Lock is a lock that its holder may keep while it waits for devices. It is
// a channel of one place, empty while nobody has it: who waits for it waits as
// for the devices, which a simulated clock must see.
type Lock chan struct{}

// NewLock returns a lock that nobody has.
func NewLock() Lock { return make(Lock, 1) }

// Lock waits until nobody has the lock, and takes it.
func (l Lock) Lock() { l <- struct{}{} }

// Unlock gives it back.
func (l Lock) Unlock() { <-l }
