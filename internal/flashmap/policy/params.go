package policy

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Params are all parameters of collection and policy. They are a value: whoever changes them
// makes another one and has it used.
type Params struct {
	// Collect are the collection parameters.
	Collect collect.Params `yaml:"collect" json:"collect"`
	// Interval is how often the engine is asked for moves.
	Interval time.Duration `yaml:"interval" json:"interval"`
	// Patterns are the pattern parameters by type of device; AnyType is for types that
	// have none.
	Patterns map[string]Pattern `yaml:"patterns" json:"patterns"`
	// Hysteresis keeps sets from going to and fro.
	Hysteresis Hysteresis `yaml:"hysteresis" json:"hysteresis"`
	// Budget limits what is moved.
	Budget Budget `yaml:"budget" json:"budget"`
}

// AnyType is the pattern of devices whose type has none of its own.
const AnyType = "default"

// MaxTypeName is how many bytes the name of a type of device may have.
const MaxTypeName = 64

// Pattern are the pattern parameters of one type of device: what a data set must show. A
// limit of 0 limits nothing.
type Pattern struct {
	// MinAccesses is how many reads and writes in a window it takes, runs apart.
	MinAccesses float64 `yaml:"min_accesses" json:"min_accesses"`
	// MinRandom is which share of the accesses must be outside of runs, 0 to 1.
	MinRandom float64 `yaml:"min_random" json:"min_random"`
	// MaxRequest is the largest mean size of requests.
	MaxRequest config.Size `yaml:"max_request" json:"max_request"`
	// MaxAge is how long ago the newest access may be.
	MaxAge time.Duration `yaml:"max_age" json:"max_age"`
	// MinReferences is how many references what lies there must have.
	MinReferences int `yaml:"min_references" json:"min_references"`
	// Promote is a rule that must hold, too, if it is not empty.
	Promote string `yaml:"promote" json:"promote"`
	// Demote is a rule by which a set that is on flash leaves it first when its slot is
	// wanted, if it is not empty.
	Demote string `yaml:"demote" json:"demote"`
	// Saves is the time that an access takes less on flash than on the device.
	Saves time.Duration `yaml:"saves" json:"saves"`
	// WriteWeight is how much a write counts where a read counts 1.
	WriteWeight float64 `yaml:"write_weight" json:"write_weight"`
}

// Hysteresis are the parameters that keep sets from going to and fro.
type Hysteresis struct {
	// Keep is the part of each limit that suffices for a set to stay, above 0 to 1.
	Keep float64 `yaml:"keep" json:"keep"`
	// Margin is how many times as much as another one a set must save to take its place,
	// and Gain how many accesses in a window more.
	Margin float64 `yaml:"margin" json:"margin"`
	Gain   float64 `yaml:"gain" json:"gain"`
	// Stay is how long a set stays on flash in any case.
	Stay time.Duration `yaml:"stay" json:"stay"`
}

// Budget limits what is moved. 0 limits nothing.
type Budget struct {
	// Migrate is how many bytes are copied in a second, to flash and back.
	Migrate config.Size `yaml:"migrate" json:"migrate"`
	// Wear is how many bytes promotions and clients may write to flash in 24 hours before
	// promotions wait.
	Wear config.Size `yaml:"wear" json:"wear"`
}

// Defaults returns the parameters that measurements have led to; docs/performance.md has
// them.
func Defaults() Params {
	return Params{
		Collect: collect.Defaults(), Interval: 15 * time.Second,
		Patterns:   map[string]Pattern{AnyType: DefaultPattern()},
		Hysteresis: Hysteresis{Keep: 0.25, Margin: 1.25, Gain: 8, Stay: 5 * time.Minute},
		Budget:     Budget{Migrate: 32 << 20},
	}
}

// DefaultPattern is the pattern of rotating disks.
func DefaultPattern() Pattern {
	return Pattern{MinAccesses: 4, MinRandom: 0.5, MaxRequest: 256 << 10, MaxAge: time.Hour, Saves: 8 * time.Millisecond, WriteWeight: 1}
}

// UnmarshalYAML reads a pattern over the default one.
func (p *Pattern) UnmarshalYAML(read func(any) error) error {
	type plain Pattern // without this method
	q := plain(DefaultPattern())
	if err := read(&q); err != nil {
		return err
	}
	*p = Pattern(q)
	return nil
}

// decoding is how parameters are read: strictly, and times also as the nanoseconds that JSON
// has for them.
var decoding = []yaml.DecodeOption{yaml.Strict(), yaml.CustomUnmarshaler(func(d *time.Duration, b []byte) (err error) {
	s := strings.Trim(string(b), " \t\n\"'")
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		*d = time.Duration(n)
		return nil
	}
	*d, err = time.ParseDuration(s)
	return err
})}

// Parse reads parameters, YAML or JSON, over the defaults. Unknown parameters are errors, and
// so is what Validate refuses.
func Parse(b []byte) (Params, error) {
	p := Defaults()
	if len(b) > 0 {
		if err := yaml.UnmarshalWithOptions(b, &p, decoding...); err != nil {
			return Params{}, err
		}
	}
	if _, ok := p.Patterns[AnyType]; !ok {
		if p.Patterns == nil {
			p.Patterns = map[string]Pattern{}
		}
		p.Patterns[AnyType] = DefaultPattern()
	}
	return p, p.Validate()
}

// Limits of parameters.
const (
	minInterval  = 100 * time.Millisecond
	maxTypes     = 64
	maxReference = 1 << 30
)

// Validate says what is wrong with the parameters, naming the parameter. An error of a rule
// is a *RuleError.
func (p *Params) Validate() error {
	_, err := p.compile()
	return err
}

// compile validates the parameters and returns the rules by the type of device.
func (p *Params) compile() (map[string]rules, error) {
	if err := p.Collect.Validate(); err != nil {
		return nil, fmt.Errorf("collect.%w", err)
	}
	h := &p.Hysteresis
	switch {
	case p.Interval < minInterval || p.Interval > p.Collect.Window:
		return nil, fmt.Errorf("interval: %v; %v to the window's %v are possible", p.Interval, minInterval, p.Collect.Window)
	case len(p.Patterns) > maxTypes:
		return nil, fmt.Errorf("patterns: %d types of devices; at most %d are possible", len(p.Patterns), maxTypes)
	case !(h.Keep > 0 && h.Keep <= 1):
		return nil, fmt.Errorf("hysteresis.keep: %v; above 0 to 1 is possible", h.Keep)
	case !within(h.Margin, 1, 1000):
		return nil, fmt.Errorf("hysteresis.margin: %v; 1 to 1000 are possible", h.Margin)
	case !within(h.Gain, 0, math.MaxInt32):
		return nil, fmt.Errorf("hysteresis.gain: %v is no number of accesses", h.Gain)
	case h.Stay < 0 || h.Stay > 30*24*time.Hour:
		return nil, fmt.Errorf("hysteresis.stay: %v; 0 to 30 days are possible", h.Stay)
	case p.Budget.Migrate < 0:
		return nil, fmt.Errorf("budget.migrate: %d bytes a second", int64(p.Budget.Migrate))
	case p.Budget.Wear < 0:
		return nil, fmt.Errorf("budget.wear: %d bytes a day", int64(p.Budget.Wear))
	}
	all := map[string]rules{}
	for _, typ := range slices.SortedFunc(maps.Keys(p.Patterns), cmp.Compare) {
		if typ == "" || len(typ) > MaxTypeName {
			return nil, fmt.Errorf("patterns: %q is no type of device", typ)
		}
		q := p.Patterns[typ]
		r, err := q.compile("patterns." + typ)
		if err != nil {
			return nil, err
		}
		all[typ] = r
	}
	return all, nil
}

// within reports whether v is a number from lo to hi.
func within(v, lo, hi float64) bool { return v >= lo && v <= hi }

// compile validates a pattern and returns its rules.
func (p *Pattern) compile(name string) (r rules, err error) {
	switch {
	case !within(p.MinAccesses, 0, math.MaxInt32):
		return r, fmt.Errorf("%s.min_accesses: %v is no number of accesses", name, p.MinAccesses)
	case !within(p.MinRandom, 0, 1):
		return r, fmt.Errorf("%s.min_random: %v is no share; 0 to 1 are possible", name, p.MinRandom)
	case p.MaxRequest < 0:
		return r, fmt.Errorf("%s.max_request: %d bytes", name, int64(p.MaxRequest))
	case p.MaxAge < 0:
		return r, fmt.Errorf("%s.max_age: %v", name, p.MaxAge)
	case p.MinReferences < 0 || p.MinReferences > maxReference:
		return r, fmt.Errorf("%s.min_references: %d; 0 to %d are possible", name, p.MinReferences, maxReference)
	case p.Saves <= 0 || p.Saves > time.Minute:
		return r, fmt.Errorf("%s.saves: %v; up to a minute is possible", name, p.Saves)
	case !within(p.WriteWeight, 0, 1000):
		return r, fmt.Errorf("%s.write_weight: %v; 0 to 1000 are possible", name, p.WriteWeight)
	}
	if r.promote, err = compileRule(name+".promote", p.Promote); err != nil {
		return r, err
	}
	r.demote, err = compileRule(name+".demote", p.Demote)
	return r, err
}

// pattern returns the pattern of a type of device.
func (p *Params) pattern(typ string) (Pattern, string) {
	if q, ok := p.Patterns[typ]; ok {
		return q, typ
	}
	return p.Patterns[AnyType], AnyType
}
