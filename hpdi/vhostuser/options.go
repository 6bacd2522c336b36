package vhostuser

import (
	"cmp"
	"fmt"
	"net/url"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// Choice is whether something is wanted, or left to what both sides can do.
type Choice string

// The choices. The empty one is Auto.
const (
	Auto Choice = "auto"
	On   Choice = "on"
	Off  Choice = "off"
)

// Options are how a device is opened.
type Options struct {
	// Queues is how many virtqueues there are at most, 1 if 0; a back-end that has fewer
	// is not asked for more. Queues of the application share them in turn.
	Queues int
	// QueueSize is how many descriptors each one has, 256 if 0. Split queues need a power
	// of two.
	QueueSize int
	// Packed: packed virtqueues; On: fail without, Off: split ones.
	Packed Choice
	// NoEventIdx and NoIndirect do without these features of virtqueues.
	NoEventIdx, NoIndirect bool
	// Writeback says whether the back-end may complete writes before they are durable.
	// Off makes each write durable if the back-end can do that, and else fails.
	Writeback Choice
	// ReadOnly refuses requests that change the device.
	ReadOnly bool
	// Reconnect is how long requests wait at most for a connection that has ended to be
	// made again; 0: they fail at once, and so do all later ones.
	Reconnect time.Duration
	// Poll is how long somebody who waits looks at most before sleeping; 0: not at all.
	Poll time.Duration
	// Timeout is how long the back-end may take to answer a message, 10 seconds if 0, and
	// half of how long it may take until the device is up.
	Timeout time.Duration
}

const (
	defaultQueueSize = 256
	mostQueues       = 64
	mostQueueSize    = 1024
	defaultTimeout   = 10 * time.Second
	defaultReconnect = 30 * time.Second
	defaultPoll      = 50 * time.Microsecond
	mostPoll         = 10 * time.Millisecond
)

// Properties are what the URI of a device takes.
var Properties = []hpdi.Property{
	{Name: "queues", Type: hpdi.TypeInt, Default: "1", Min: 1, Max: mostQueues, Meaning: "Virtqueues that are used at most"},
	{Name: "queue-size", Type: hpdi.TypeInt, Default: fmt.Sprint(defaultQueueSize), Min: 4, Max: mostQueueSize, Meaning: "Descriptors of a virtqueue, a power of two unless it is packed"},
	choice("packed", "Packed virtqueues, which both sides read with fewer accesses to memory"),
	{Name: "event-idx", Type: hpdi.TypeBool, Default: "on", Meaning: "Each side tells at which request it wants to be notified"},
	{Name: "indirect", Type: hpdi.TypeBool, Default: "on", Meaning: "Long requests take one descriptor of the virtqueue"},
	choice("writeback", "Writes may complete before they are durable"),
	{Name: "read-only", Type: hpdi.TypeBool, Default: "off", Meaning: "Requests that change the device are refused"},
	{Name: "reconnect", Type: hpdi.TypeDuration, Default: defaultReconnect.String(), Max: int64(24 * time.Hour), Meaning: "How long requests wait for a back-end that has gone; 0s: not at all"},
	{Name: "poll", Type: hpdi.TypeDuration, Default: defaultPoll.String(), Max: int64(mostPoll), Meaning: "How long somebody who waits looks at most before sleeping; 0s: not at all"},
	{Name: "timeout", Type: hpdi.TypeDuration, Default: defaultTimeout.String(), Min: int64(time.Millisecond), Max: int64(time.Hour), Meaning: "How long the back-end may take to answer a message"},
}

func choice(name, meaning string) hpdi.Property {
	return hpdi.Property{Name: name, Type: hpdi.TypeEnum, Default: string(Auto), Values: []string{string(Auto), string(On), string(Off)}, Meaning: meaning}
}

// ParseOptions makes options of the query of a URI. The error wraps hpdi.ErrProperty.
func ParseOptions(values url.Values) (Options, error) {
	s, err := hpdi.ParseSettings(Properties, values)
	if err != nil {
		return Options{}, err
	}
	return Options{
		Queues: s.Int("queues"), QueueSize: s.Int("queue-size"), Packed: Choice(s.Text("packed")),
		NoEventIdx: !s.Bool("event-idx"), NoIndirect: !s.Bool("indirect"), Writeback: Choice(s.Text("writeback")),
		ReadOnly: s.Bool("read-only"), Reconnect: s.Duration("reconnect"), Poll: s.Duration("poll"), Timeout: s.Duration("timeout"),
	}, nil
}

// fill sets the defaults and returns an error unless all is within its bounds.
func (o *Options) fill() error {
	o.Queues = cmp.Or(o.Queues, 1)
	o.QueueSize = cmp.Or(o.QueueSize, defaultQueueSize)
	o.Packed, o.Writeback = cmp.Or(o.Packed, Auto), cmp.Or(o.Writeback, Auto)
	o.Timeout = cmp.Or(o.Timeout, defaultTimeout)
	if o.Queues < 1 || o.Queues > mostQueues {
		return fmt.Errorf("%d queues, there may be 1 to %d", o.Queues, mostQueues)
	}
	if o.QueueSize < 4 || o.QueueSize > mostQueueSize {
		return fmt.Errorf("queues of %d descriptors, they may have 4 to %d", o.QueueSize, mostQueueSize)
	}
	if o.Reconnect < 0 || o.Poll < 0 || o.Timeout < 0 {
		return fmt.Errorf("a time that is negative: reconnect %v, poll %v, timeout %v", o.Reconnect, o.Poll, o.Timeout)
	}
	if o.Packed == Off {
		return virtio.CheckSize(o.QueueSize, false)
	}
	return nil
}
