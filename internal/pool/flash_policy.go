package pool

import (
	"context"
	"errors"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// FlashChange changes what is kept of the policy of a pool's flash; what is nil stays.
type FlashChange struct {
	// Params returns the parameters that are to count instead of those that do.
	Params func(now policy.Params) (policy.Params, error)
	// Classes are given to devices, by their names; an empty one takes back what was given.
	Classes map[string]string
	// Pin and Unpin are added and taken away. A pin that is there already and one that is
	// not there are errors, block.ErrExists and block.ErrNotFound.
	Pin, Unpin []FlashPin
}

// AddFlash makes a device the flash of the pool: hot data sets of the others move there. There
// may be one, which may be a mirror; without a mirror whatever is on it is lost with it.
// setBytes is the size of a data set, 0 for DefaultSetBytes.
func (p *Pool) AddFlash(ctx context.Context, dev hpdi.Device, setBytes int64) error {
	return errors.ErrUnsupported
}

// DefaultSetBytes is the size of data sets unless another one is asked for.
const DefaultSetBytes = 256 << 10

// Flash tells of the flash layer. It waits for no device.
func (p *Pool) Flash() FlashStats { return FlashStats{} }

// FlashPolicy returns the parameters that count, and the pins. The error is of kind
// block.ErrNotFound for a pool without flash, as that of all that follow.
func (p *Pool) FlashPolicy() (policy.Params, []FlashPin, error) {
	return policy.Params{}, nil, errors.ErrUnsupported
}

// ChangeFlash changes the policy, durably, and returns what that changes. Where something is
// wrong nothing changes; the error of a rule is a *policy.RuleError.
func (p *Pool) ChangeFlash(ctx context.Context, c FlashChange) ([]policy.Change, error) {
	return nil, errors.ErrUnsupported
}

// EvacuateFlash begins to move all data sets back to their devices (start), across restarts
// and takeovers, or ends that, so that flash is used again (stop).
func (p *Pool) EvacuateFlash(ctx context.Context, action string) error { return errors.ErrUnsupported }

// What can be asked of an evacuation.
const (
	EvacuateStart = "start"
	EvacuateStop  = "stop"
)

// ExplainFlash says why a block of a volume is where it is.
func (p *Pool) ExplainFlash(ctx context.Context, volume string, offset int64) (FlashExplanation, error) {
	return FlashExplanation{}, errors.ErrUnsupported
}

// SimulateFlash replays the history that was collected against parameters and a number of
// slots, 0 for those that there are, and predicts what they would come to. It moves nothing.
func (p *Pool) SimulateFlash(ctx context.Context, params policy.Params, slots int) (FlashPrediction, error) {
	return FlashPrediction{}, errors.ErrUnsupported
}
