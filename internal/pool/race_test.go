//go:build race

package pool

// raced says that the race detector is on, with which everything takes long.
const raced = true
