//go:build race

package sim

// raced says that the race detector is on. It makes the order in which
// goroutines run random, so that nothing can be replayed.
const raced = true
