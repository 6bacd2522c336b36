package control

// The states of a pool that was found on devices.
const (
	FoundExported    = "exported"     // nobody has it
	FoundNotExported = "not exported" // it was closed, and may be opened again where it was
	FoundNotClosed   = "not closed"   // it is in use somewhere, or its host ended without closing it
	FoundInUse       = "in use"       // by a process on this host
	FoundIncomplete  = "incomplete"   // devices are missing, or cannot be told apart
)

// FoundPool is a pool as its devices tell of it.
type FoundPool struct {
	Name  string `json:"name"`
	ID    string `json:"id"`
	Guest string `json:"guest"` // that it belonged to
	State string `json:"state"`
	Host  string `json:"host,omitempty"` // that had it last, as far as is known
	// Boot is that of the host on which it was not closed, Region where its newest
	// writes were then, and Here says that this is that boot.
	Boot    string        `json:"boot,omitempty"`
	Region  string        `json:"region,omitempty"`
	Here    bool          `json:"here,omitempty"`
	Epoch   uint64        `json:"epoch"`
	Wants   int           `json:"wants"` // devices it has; 0 while its first one is missing
	Devices []FoundDevice `json:"devices"`
	Missing []int         `json:"missing,omitempty"` // their numbers, from 1
	// Notes are what a person should know before it is imported.
	Notes []string `json:"notes,omitempty"`
}

// FoundDevice is a device of a pool that was found.
type FoundDevice struct {
	Number int         `json:"number"` // in its pool, from 1
	Size   int64       `json:"size"`
	Copies []FoundCopy `json:"copies"` // of a mirror; else one
}

// FoundCopy is a file or block device.
type FoundCopy struct {
	Path  string `json:"path,omitempty"` // empty while it is missing
	State string `json:"state,omitempty"`
	InUse bool   `json:"in_use,omitempty"` // locked by a process on this host
}

// Found is what a look for pools has found.
type Found struct {
	Pools []FoundPool `json:"pools"`
	// Notes tell of devices that could not be looked at, or make no sense.
	Notes []string `json:"notes,omitempty"`
}

// PoolExport asks that a pool be closed, so that it can be taken elsewhere.
type PoolExport struct {
	// Force cuts clients off.
	Force bool `json:"force,omitempty"`
}

// PoolImport asks for a pool that was found.
type PoolImport struct {
	Pool  string   `json:"pool"`            // its name or id
	Paths []string `json:"paths,omitempty"` // where to look; all block devices and the pair's directory if empty
	As    string   `json:"as,omitempty"`    // name that it shall have; empty: as it is called
	Guest string   `json:"guest,omitempty"` // that shall have it; empty: one without a pool
	// Force takes a pool that was not exported, AcceptLoss one whose newest writes
	// are in a region of this host that is not to be had.
	Force      bool `json:"force,omitempty"`
	AcceptLoss bool `json:"accept_loss,omitempty"`
}
