package guest

import (
	"context"
	"errors"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/restart"
)

// Storage opens and makes pools. The real one is made of package pool.
type Storage interface {
	// Open opens the pool of devices, which it owns from then on and closes
	// also when it fails. ErrNoPool: none of the devices belongs to a pool.
	Open(ctx context.Context, o OpenSpec) (Store, error)
	// Create makes an empty pool on devices that hold nothing. They stay open.
	Create(ctx context.Context, o CreateSpec) error
	// Label says which pool a device belongs to; ErrNoPool when to none.
	Label(dev hpdi.Device) (Label, error)
	// Adopt labels devices, all of one pool that nobody has open, for an identity.
	// It may be repeated when it was interrupted.
	Adopt(o AdoptSpec) error
}

// ErrNoPool says that a device belongs to no pool.
var ErrNoPool = errors.New("belongs to no pool")

// Label is what a device says about its pool.
type Label struct {
	Pool     block.PoolID
	Name     string
	Identity string
}

// OpenSpec says which pool to open.
type OpenSpec struct {
	Identity   string
	Owner      string // guest that takes ownership
	Devices    []hpdi.Device
	RegionPath string
	// Restart is a record of the pool, all of whose devices are as it says, or nil; Without
	// says then why there is none.
	Restart    *restart.Record
	Without    Opened
	AcceptLoss bool
	// BatteryBacked makes flushes free.
	BatteryBacked bool
	// LeftOut is told of a device that is no part of the pool, because its
	// addition was interrupted. It is closed then.
	LeftOut func(hpdi.Device)
	// Removed is told of a device that is no part of the pool any more, and closes it.
	Removed func(hpdi.Device)
	// Tell, if set, hears what people may want to know of the pool, for the log
	// of events. It does not block.
	Tell func(kind, text string)
}

// Opened says how a pool was opened.
type Opened struct {
	Number uint64 // of the restart record, if it was opened by one
	Why    string // it was not, empty if it was
	Quiet  bool   // nobody wonders that it was not
}

// CreateSpec says which pool to make.
type CreateSpec struct {
	Name     string
	Identity string
	Devices  []hpdi.Device
	LogBytes int64
}

// AdoptSpec says whose a pool from elsewhere becomes.
type AdoptSpec struct {
	Pool     string // its id
	Name     string // that it is to have
	Identity string
	Devices  []hpdi.Device
	Epoch    block.Epoch // that it was found in; a higher one refuses it
}

// VolumeInfo describes a volume of a store.
type VolumeInfo struct {
	ID      block.VolumeID // it keeps when it is renamed
	Name    string
	Size    int64
	Used    int64
	Created time.Time
	THN     int // 0 if it shares no blocks
	// Survey is what was found of it, nil if it was not surveyed.
	Survey *control.VolumeSurvey
}

// Store is an open pool.
type Store interface {
	Name() string
	// Region describes the region as it is announced.
	Region() partner.Region
	// Steps are the timed parts of Open.
	Steps() []partner.Step
	// Run keeps the pool going until ctx ends or the pool can go on no more:
	// block.ErrStale when another guest owns it.
	Run(ctx context.Context) error
	// Progress returns two numbers of which the first changes while Run gets on, and the
	// second also when clients read from devices.
	Progress() (own, anything uint64)
	// Probe passes the way of a write up to log publication.
	Probe(ctx context.Context) error
	// Beat advances the heartbeat in the region.
	Beat()
	Heartbeat() uint64
	Volumes() []VolumeInfo
	Volume(name string) (block.Volume, error)
	// CreateVolume makes a volume that shares series of thn blocks, or none with 0.
	CreateVolume(ctx context.Context, name string, size int64, thn int) error
	ResizeVolume(ctx context.Context, name string, size int64) error
	RenameVolume(ctx context.Context, old, name string) error
	// SetSharing makes a volume share series of thn blocks, or nothing more with 0.
	SetSharing(ctx context.Context, name string, thn int) error
	DeleteVolume(ctx context.Context, name string) error
	AddDevice(ctx context.Context, dev hpdi.Device) error
	// AddMemory is AddDevice for low-latency random read memory.
	AddMemory(ctx context.Context, dev hpdi.Device) error
	// AddFlash is AddDevice for flash, with data sets of so many bytes; 0 is the default.
	AddFlash(ctx context.Context, dev hpdi.Device, setBytes int64) error
	// Flash tells of it; no device is a pool without. It waits for no device. What
	// follows is an error of kind block.ErrNotFound then.
	Flash() pool.FlashStats
	FlashPolicy(ctx context.Context) (policy.Params, []pool.FlashPin, error)
	ChangeFlash(ctx context.Context, c pool.FlashChange) ([]policy.Change, error)
	EvacuateFlash(ctx context.Context, action string) error
	ExplainFlash(ctx context.Context, volume string, offset int64) (pool.FlashExplanation, error)
	SimulateFlash(ctx context.Context, params policy.Params, slots int) (pool.FlashPrediction, error)
	// RemoveDevice begins to take a device out, by its name.
	RemoveDevice(ctx context.Context, name string) error
	// CancelRemoval makes the device that is being taken out stay.
	CancelRemoval(ctx context.Context) error
	// SetSettings changes settings that are kept with the pool.
	SetSettings(ctx context.Context, c pool.SettingsChange) error
	// Dedup tells what the pool's volumes share.
	Dedup(ctx context.Context) (control.PoolDedup, error)
	// Check recounts; Problems are what is wrong, the error why it could not.
	Check(ctx context.Context) (control.PoolCheck, error)
	// Checking tells how far a Check under way has come.
	Checking() (now control.CheckProgress, ok bool)
	// Scan begins, undoes, pauses, goes on with or ends the deduplication of what a
	// volume has stored before.
	Scan(ctx context.Context, name, action string) error
	// Scrub begins, pauses, goes on with or ends a scrub.
	Scrub(ctx context.Context, action string) error
	// Survey begins or ends a survey.
	Survey(ctx context.Context, action string) error
	Stats() control.PoolStatus
	// Opened says how the pool was opened.
	Opened() Opened
	// Restart returns what the pool knows for a restart record, with the names of devices in
	// the place of their copies.
	Restart(ctx context.Context) (*restart.Record, error)
	// KeepRecord stores an encoded record in the region.
	KeepRecord(enc []byte) error
	// Close ends cleanly: nothing is left in the region, which is removed.
	Close(ctx context.Context) error
	// Export is Close for a pool that is to be taken elsewhere, and labels it so.
	Export(ctx context.Context) error
	// Release leaves at once; the log stays in the region for the next owner.
	Release() error
}
