package ring

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// Properties are what the URI of a ring takes: ring:PATH?name=value&...
var Properties = []hpdi.Property{
	{Name: "queues", Type: hpdi.TypeInt, Default: "4", Min: 1, Max: core.MaxQueues, Meaning: "How many queues the application can have at once"},
	{Name: "entries", Type: hpdi.TypeInt, Default: "128", Min: core.MinEntries, Max: core.MaxEntries, Meaning: "Requests in flight of each queue, rounded up to a power of two"},
	{Name: "poll", Type: hpdi.TypeDuration, Default: "50us", Min: 0, Max: int64(10 * time.Second), Meaning: "How long a queue looks for completions before it sleeps, at most; it looks less where that is in vain"},
	{Name: "size", Type: hpdi.TypeSize, Min: 0, Max: core.MaxRing, Meaning: "Bytes of the memory at PATH, where that is a device that both sides map; files tell it"},
	{Name: "reconnect", Type: hpdi.TypeDuration, Default: "1m", Min: 0, Max: int64(24 * time.Hour), Meaning: "How long the driver looks for a back-end when there is none, before requests fail"},
}

// Options are of a device.
type Options struct {
	Queues    int           // 1 to 64; 0 is 4
	Entries   int           // requests in flight of each queue, rounded up to a power of two, up to 4096; 0 is 128
	Poll      time.Duration // how long a queue looks for completions before it sleeps, at most
	Reconnect time.Duration // how long a back-end is looked for before requests fail
	Size      int64         // bytes of a device that both sides map; 0 is those of the file
}

// ParseOptions returns the options that the query of a URI asks for. An error wraps
// hpdi.ErrProperty.
func ParseOptions(query url.Values) (Options, error) {
	s, err := hpdi.ParseSettings(Properties, query)
	if err != nil {
		return Options{}, err
	}
	return Options{Queues: s.Int("queues"), Entries: s.Int("entries"), Poll: s.Duration("poll"), Reconnect: s.Duration("reconnect"), Size: s.Size("size")}, nil
}

// shape returns that of the ring of a device with these options.
func (o Options) shape() (core.Shape, error) {
	s := core.Shape{Session: rand.Uint64(), Queues: o.Queues, Entries: o.Entries, Bells: true}
	if s.Queues == 0 {
		s.Queues = 4
	}
	if s.Entries == 0 {
		s.Entries = 128
	}
	for n := core.MinEntries; ; n *= 2 {
		if n >= s.Entries && s.Entries > 0 {
			s.Entries = n
			break
		}
		if n > core.MaxEntries {
			break // Check says so
		}
	}
	for s.Session == 0 {
		s.Session = rand.Uint64()
	}
	for i := range s.ID {
		s.ID[i] = byte(rand.Uint32())
	}
	if err := s.Check(); err != nil {
		return s, fmt.Errorf("ring: %w", err)
	}
	return s, nil
}
