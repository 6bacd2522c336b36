package mirror

// ioLock is a lock that its holder may keep while it waits for devices. It is
// a channel of one place, empty while nobody has it: who waits for it waits as
// for the devices, which a simulated clock must see.
type ioLock chan struct{}

func newIOLock() ioLock { return make(ioLock, 1) }

// Lock waits until nobody has the lock, and takes it.
func (l ioLock) Lock() { l <- struct{}{} }

// Unlock gives it back.
func (l ioLock) Unlock() { <-l }
