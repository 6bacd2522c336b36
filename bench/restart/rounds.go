package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

const roundLimit = 3 * time.Minute

// Names of the cases.
const (
	caseOwn      = "own"
	caseClean    = "clean"
	caseTakeover = "takeover"
	caseQEMU     = "qemu"
	caseTGT      = "tgt"
)

var caseNames = []string{caseOwn, caseClean, caseTakeover, caseQEMU, caseTGT}

// measure makes what is measured and goes through all rounds.
func measure(ctx context.Context, o options, names []string, rep *report) (err error) {
	b := &bench{options: o, report: rep, run: map[string]func(context.Context) (sample, error){}}
	if slices.ContainsFunc(names, func(n string) bool { return n == caseOwn || n == caseClean || n == caseTakeover }) {
		w, err := newWorld(ctx, o)
		if w != nil && w.pair != nil {
			defer func() {
				// Also after an interrupt nothing may stay behind.
				down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
				defer cancel()
				err = errors.Join(err, w.pair.Remove(down))
			}()
		}
		if err != nil {
			return err
		}
		b.world = w
		b.run[caseOwn], b.run[caseClean], b.run[caseTakeover] = b.own, b.clean, b.takeover
		begun := time.Now()
		if err := askAll(ctx, w.uris, volumeSize); err != nil {
			return err
		}
		rep.Asking = ms(time.Since(begun))
	}
	if slices.Contains(names, caseQEMU) || slices.Contains(names, caseTGT) {
		if err := b.makePeers(); err != nil {
			return err
		}
	}
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return b.run[n] == nil })
	for n := range o.rounds {
		for i := range names {
			name := names[(n+i)%len(names)]
			if err := b.round(ctx, name); err != nil {
				return fmt.Errorf("round %d of %s: %w", n+1, name, err)
			}
			s := rep.last(name)
			fmt.Fprintf(os.Stderr, "%-8s %d/%d  first read %8.1f ms, all exports %8.1f ms  %v\n", name, n+1, o.rounds, s.Read, s.All, s.Steps)
		}
	}
	if b.world != nil {
		if err := b.world.pair.Until(ctx, healLimit, pair.Well); err != nil {
			return err
		}
		if _, err := b.world.pair.Check(ctx); err != nil {
			return fmt.Errorf("after all rounds: %w", err)
		}
	}
	return nil
}

type bench struct {
	options
	world  *world
	report *report
	run    map[string]func(context.Context) (sample, error)
	files  []string // that peers serve
}

func (b *bench) round(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, roundLimit, fmt.Errorf("the round took longer than %v: %w", roundLimit, context.DeadlineExceeded))
	defer cancel()
	s, err := b.run[name](ctx)
	if err != nil {
		return err
	}
	b.report.add(name, s)
	return nil
}

// killed readies the pair for a fault and kills guests, all in one moment.
func (b *bench) killed(ctx context.Context, names ...string) (at time.Time, err error) {
	if err := b.world.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return at, err
	}
	var held []*pair.Process
	defer func() {
		for _, h := range held {
			h.Close()
		}
	}()
	for _, n := range names {
		h, err := b.world.pair.HoldGuest(ctx, n)
		if err != nil {
			return at, err
		}
		held = append(held, h)
	}
	if err := b.world.touch(ctx); err != nil {
		return at, err
	}
	// The partner first: nobody shall take a's pool in between.
	at = time.Now()
	for _, h := range held {
		if err := h.Signal(unix.SIGKILL); err != nil {
			return at, err
		}
	}
	return at, nil
}

// errPartner says that the partner was there first, and serves both pools.
var errPartner = errors.New("the partner serves the pool")

func (b *bench) own(ctx context.Context) (s sample, err error) {
	for range 5 {
		var m warm
		if m.Before, err = b.before(ctx); err != nil {
			return s, err
		}
		if _, err := b.killed(ctx, "b", guest); err != nil {
			return s, err
		}
		if s, err = b.started(ctx); !errors.Is(err, errPartner) {
			return s, errors.Join(err, b.after(ctx, &m, &s))
		}
		if err := b.giveback(ctx); err != nil {
			return s, err
		}
	}
	return s, err
}

// giveback gives guest a its pool back.
func (b *bench) giveback(ctx context.Context) error {
	if err := b.world.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return err
	}
	_, err := b.world.pair.Client().Giveback(ctx, guest)
	return err
}

func (b *bench) clean(ctx context.Context) (s sample, err error) {
	if err := b.world.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return s, err
	}
	if _, err := b.world.pair.Do(ctx, "down"); err != nil {
		return s, err
	}
	up := make(chan error, 1)
	go func() { up <- b.world.pair.Up(ctx) }()
	s, err = b.started(ctx)
	return s, errors.Join(err, <-up)
}

// started waits for answers of guest a, which is being started.
func (b *bench) started(ctx context.Context) (s sample, err error) {
	var rec struct {
		Inc     uint64    `json:"incarnation"`
		Started time.Time `json:"started"`
	}
	var rerr error
	err = b.world.answers(ctx, func() time.Time {
		var text []byte
		if text, rerr = os.ReadFile(filepath.Join(b.world.pair.Dir, "run", "guest-"+guest+".json")); rerr == nil {
			rerr = json.Unmarshal(text, &rec)
		}
		return rec.Started
	}, &s)
	if err = errors.Join(err, rerr); err != nil {
		return s, err
	}
	st, err := b.world.pair.Status(ctx)
	if err != nil {
		return s, err
	}
	if by := pair.Guest(st, guest).ServedBy; by != guest {
		return s, fmt.Errorf("%w: guest %q", errPartner, by)
	}
	text, err := os.ReadFile(filepath.Join(b.world.pair.Dir, "log", "guest-"+guest+".log"))
	if err != nil {
		return s, err
	}
	if s.Steps, err = steps(string(text), rec.Inc, rec.Started); err == nil {
		s.rest()
	}
	return s, err
}

func (b *bench) takeover(ctx context.Context) (s sample, err error) {
	var m warm
	if m.Before, err = b.before(ctx); err != nil {
		return s, err
	}
	at, err := b.killed(ctx, guest)
	if err != nil {
		return s, err
	}
	if err := b.world.answers(ctx, func() time.Time { return at }, &s); err != nil {
		return s, err
	}
	if err := b.after(ctx, &m, &s); err != nil {
		return s, err
	}
	err = b.world.pair.Until(ctx, healLimit, func(st control.Status) string {
		t := st.LastTakeover
		if t == nil || t.Kind != "takeover" || t.Of != guest || t.Started.Before(at.Truncate(time.Millisecond)) {
			return "no takeover in the status"
		}
		if t.Error != "" {
			return t.Error
		}
		s.Steps = []named{{"notice", ms(t.Started.Sub(at))}}
		for _, step := range t.Steps {
			s.Steps = append(s.Steps, named{step.Name, ms(time.Duration(step.Took))})
		}
		s.rest()
		return ""
	})
	if err != nil {
		return s, err
	}
	return s, b.giveback(ctx)
}

// rest adds what is left of the time until the first read, and from there to the end.
func (s *sample) rest() {
	sum := 0.0
	for _, step := range s.Steps {
		sum += step.Took
	}
	s.Steps = append(s.Steps, named{"first read", s.Read - sum}, named{"other exports", s.All - s.Read})
}

// steps reads from the log of a guest what its newest start took, by step: what the
// lines' times tell, then what the guest says.
func steps(log string, inc uint64, started time.Time) (out []named, err error) {
	at := started
	for line := range strings.Lines(log) {
		f := fields(line)
		if f["incarnation"] != fmt.Sprint(inc) || f["identity"] != "" && f["identity"] != guest {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, f["time"])
		if err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		if t.Before(started.Truncate(time.Millisecond)) {
			continue // the numbers of starts begin anew with each pair
		}
		switch f["msg"] {
		case "guest starts":
			out = append(out, named{"process", max(0, ms(t.Sub(at)))})
			at = t
		case "granted":
			out = append(out, named{"hello and grant", ms(t.Sub(at))})
		case "serving":
			for part := range strings.SplitSeq(f["steps"], ", ") {
				name, took, _ := strings.Cut(part, ": ")
				if name == "start" {
					continue // since the end before was noticed: more than this start
				}
				d, err := time.ParseDuration(took)
				if err != nil {
					return nil, fmt.Errorf("%q: %w", line, err)
				}
				out = append(out, named{name, ms(d)})
			}
			return out, nil
		}
	}
	return nil, errors.New("the log of the guest does not say that it serves")
}

// fields takes a line of a log apart.
func fields(line string) map[string]string {
	f := map[string]string{}
	for rest := strings.TrimSpace(line); rest != ""; rest = strings.TrimLeft(rest, " ") {
		name, after, ok := strings.Cut(rest, "=")
		if !ok {
			break
		}
		value := after
		if strings.HasPrefix(after, `"`) {
			if end := strings.Index(after[1:], `"`); end >= 0 {
				value, rest = after[1:end+1], after[end+2:]
				f[name] = value
				continue
			}
		}
		value, rest, _ = strings.Cut(after, " ")
		f[name] = value
	}
	return f
}
