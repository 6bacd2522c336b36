package nbd

// contextAllocationID is the number of the only metadata context there is, on every
// connection that selected it.
const contextAllocationID = 1

// Block sizes told to clients.
const (
	minBlock       = 1
	preferredBlock = 4096
)
