package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// What clients of a primary device wait for while data sets are moved from it and to it:
// requests come at random times, wait for each other and for those of the moves, which are
// the real ones of package flashmap. Clients read and write 4 KiB at random, half of it what
// is on flash and stays there.
const (
	busyShare = 0.55 // of the primary's time, with clients alone
	tailLimit = 1.1  // times as long as without moves
	setsFixed = 256  // on flash, for clients
	setsMoved = 164  // on flash, and moved
	setsAll   = 4096
)

// pacing is how the steps of moves follow each other.
type pacing string

const (
	without  pacing = "none"
	burst    pacing = "at once" // as fast as they go
	withPace pacing = "paced"   // as policy.Pace says
)

// waits are how long requests took.
type waits struct {
	Mean, P99 time.Duration
	Requests  int
}

func sum(all []time.Duration) waits {
	if len(all) == 0 {
		return waits{}
	}
	slices.Sort(all)
	total := time.Duration(0)
	for _, d := range all {
		total += d
	}
	return waits{total / time.Duration(len(all)), all[len(all)*99/100], len(all)}
}

// latency is what moves have cost clients of one kind of primary device.
type latency struct {
	Drive string
	Rows  []latencyRow
}

type latencyRow struct {
	Pacing         pacing
	Primary, Flash waits
	Busy           float64 // share of the primary's time
	Moved          int     // sets
	Speed          float64 // bytes a second
}

// drives are the kinds of primary devices, and how long each is used.
var drives = []struct {
	name  string
	takes time.Duration
}{{"disk", 3 * time.Hour}, {"SSD", 20 * time.Second}}

// measureLatencies measures all kinds, for a part of their time.
func measureLatencies(ctx context.Context, part int, seed uint64, b policy.Budget) (all []*latency, err error) {
	for _, d := range drives {
		begun := time.Now()
		l, err := measureLatency(ctx, d.name, d.takes/time.Duration(part), seed, b)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(os.Stderr, "%s with moves: %v\n", d.name, time.Since(begun).Round(time.Second))
		all = append(all, l)
	}
	return all, nil
}

// measureLatency measures a kind of primary with moves of each pacing.
func measureLatency(ctx context.Context, name string, takes time.Duration, seed uint64, b policy.Budget) (*latency, error) {
	out := &latency{Drive: name}
	for _, p := range []pacing{without, burst, withPace} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		row, err := newTraffic(name, seed).run(p, takes, b)
		if err != nil {
			return nil, fmt.Errorf("latency of clients, %s, moves %s: %w", name, p, err)
		}
		out.Rows = append(out.Rows, row)
	}
	return out, nil
}

// traffic is clients and a mover on one primary device with flash.
type traffic struct {
	clock
	rnd, choice   *rand.Rand
	name          string
	setBytes      int64
	primary       *timed
	flash         *timed
	f             *flashmap.Flash
	dev           flashmap.Device
	queue         hpdi.Queue
	mean          time.Duration // between requests
	arrives       time.Duration // the next request
	began         map[*hpdi.Request]time.Duration
	spare, done   []*hpdi.Request
	page          []byte
	took          [2][]time.Duration // of requests to the primary, and to flash
	movable, here []int              // sets that are not on flash, and that are
	err           error
}

func newTraffic(name string, seed uint64) *traffic {
	return &traffic{
		name: name, setBytes: 256 * kib, page: make([]byte, block.Size), began: map[*hpdi.Request]time.Duration{},
		rnd: rand.New(rand.NewPCG(seed, 1)), choice: rand.New(rand.NewPCG(seed, 2)), arrives: never,
	}
}

// run has clients use the device for a time, and moves happen meanwhile.
func (x *traffic) run(p pacing, takes time.Duration, b policy.Budget) (latencyRow, error) {
	row := latencyRow{Pacing: p}
	if err := x.open(); err != nil {
		return row, err
	}
	x.arrives = x.pause()
	x.until = x.clients
	pace := policy.Pace{}
	pace.Use(b)
	for p != without && x.now < takes && x.err == nil {
		m, err := x.begin()
		if err != nil {
			return row, err
		}
		for progress := flashmap.Moving; progress != flashmap.Done; {
			if p == withPace {
				for wait := pace.Wait(epoch.Add(x.now), x.busy()); wait > 0; wait = pace.Wait(epoch.Add(x.now), x.busy()) {
					x.now += wait
				}
			}
			before, copied := x.now, m.Copied()
			if progress, err = m.Step(); err != nil {
				return row, err
			}
			pace.Stepped(epoch.Add(x.now), x.now-before, m.Copied()-copied)
			if progress == flashmap.Waiting {
				x.now = max(x.now, min(x.arrives, x.next()))
				x.clients(x.now)
			}
		}
		row.Moved++
	}
	x.clients(takes)
	row.Busy = float64(x.primary.d.busy()) / float64(takes)
	row.Speed = float64(row.Moved) * float64(x.setBytes) / takes.Seconds()
	row.Primary, row.Flash = sum(x.took[0]), sum(x.took[1])
	return row, x.err
}

// open makes the devices, and puts sets on flash.
func (x *traffic) open() error {
	flash, err := mem.New("flash", (setsFixed+setsMoved+64)*x.setBytes+16*mib)
	if err != nil {
		return err
	}
	primary, err := mem.New("primary", setsAll*x.setBytes)
	if err != nil {
		return err
	}
	x.flash, x.primary = &timed{Device: flash, c: &x.clock}, &timed{Device: primary, c: &x.clock, empty: true}
	if _, err = flashmap.Create(x.flash, flashmap.CreateOptions{SetBytes: x.setBytes, Reach: setsAll * x.setBytes}); err != nil {
		return err
	}
	if x.f, err = flashmap.Open(x.flash); err != nil {
		return err
	}
	if x.dev, err = x.f.Over(x.primary, flashmap.Primary{Number: 1, ID: block.DeviceID{1}}); err != nil {
		return err
	}
	for set := range setsAll {
		if set >= setsFixed+setsMoved {
			x.movable = append(x.movable, set)
			continue
		}
		m, err := x.f.MoveIn(1, flashmap.Set(set))
		for p := flashmap.Moving; err == nil && p != flashmap.Done; {
			p, err = m.Step()
		}
		if err != nil {
			return err
		}
		if set >= setsFixed {
			x.here = append(x.here, set)
		}
	}
	x.load()
	x.opening = true
	x.queue, err = x.dev.NewQueue(1024)
	x.opening = false
	return err
}

// load puts drives below the devices, and finds how often clients come.
func (x *traffic) load() {
	x.flash.d = newSSD(blocktest.IntelS3700)
	service := time.Duration(0)
	if x.name == "disk" {
		d := newSpread(blocktest.BarracudaES2, setsAll, x.setBytes)
		const n = 4000
		for range n {
			d.serve(0, hpdi.OpRead, x.rnd.Int64N(setsAll)*x.setBytes, block.Size)
		}
		service = d.free / n
		x.primary.d = newSpread(blocktest.BarracudaES2, setsAll, x.setBytes)
	} else {
		t := blocktest.IntelS3700
		service = time.Duration(float64(time.Second) * ((1-writes)/float64(t.Read.PerSecond) + writes/float64(t.Write.PerSecond)))
		x.primary.d = newSSD(t)
	}
	// Half of the requests go to what is on flash, and of the others a few.
	cold := 0.5 * float64(setsAll-setsFixed-setsMoved) / (setsAll - setsFixed)
	x.mean = time.Duration(float64(service) * cold / busyShare)
}

// writes is the share of requests that are.
const writes = 0.3

func (x *traffic) pause() time.Duration { return time.Duration(x.rnd.ExpFloat64() * float64(x.mean)) }

// busy is asked at the mover's time.
func (x *traffic) busy() bool {
	x.clients(x.now)
	return x.dev.Busy()
}

// begin begins a move, to flash or back by turns at random.
func (x *traffic) begin() (*flashmap.Move, error) {
	if out := len(x.here) > setsMoved || len(x.here) > setsMoved-32 && x.choice.IntN(2) == 0; out {
		i := x.choice.IntN(len(x.here))
		set := x.here[i]
		x.here = slices.Delete(x.here, i, i+1)
		x.movable = append(x.movable, set)
		return x.f.MoveOut(1, flashmap.Set(set))
	}
	i := x.choice.IntN(len(x.movable))
	set := x.movable[i]
	x.movable[i] = x.movable[len(x.movable)-1]
	x.movable = x.movable[:len(x.movable)-1]
	x.here = append(x.here, set)
	return x.f.MoveIn(1, flashmap.Set(set))
}

// clients has everything happen that clients do until a time.
func (x *traffic) clients(until time.Duration) {
	for x.err == nil && x.queue != nil {
		next := min(x.arrives, x.next())
		if next > until {
			x.client = max(x.client, until)
			x.complete() // writes that moves have held may go on now
			return
		}
		x.client = max(x.client, next)
		if x.arrives > next {
			x.complete()
			continue
		}
		r := x.request()
		x.began[r] = x.client
		if err := x.queue.Submit(r); err != nil {
			x.err = err
		}
		x.arrives += x.pause()
	}
}

// request makes the next request of clients.
func (x *traffic) request() *hpdi.Request {
	r := &hpdi.Request{Vec: [][]byte{x.page}}
	if n := len(x.spare); n > 0 {
		r, x.spare = x.spare[n-1], x.spare[:n-1]
	}
	r.Op = hpdi.OpRead
	if x.rnd.Float64() < writes {
		r.Op = hpdi.OpWrite
	}
	set := x.rnd.IntN(setsFixed)
	if x.rnd.IntN(2) == 0 {
		set = setsFixed + x.rnd.IntN(setsAll-setsFixed)
	}
	r.Offset = int64(set)*x.setBytes + x.rnd.Int64N(x.setBytes/block.Size)*block.Size
	// Where it goes when it comes; one that a move holds may go elsewhere then.
	on, _ := x.dev.OnFlash(r.Offset)
	r.User = on
	return r
}

// complete takes what is complete.
func (x *traffic) complete() {
	var err error
	x.done, err = x.queue.Wait(0, x.done[:0])
	x.err = errors.Join(x.err, err)
	for _, r := range x.done {
		x.err = errors.Join(x.err, r.Err)
		i := 0
		if r.User.(bool) {
			i = 1
		}
		x.took[i] = append(x.took[i], x.client-x.began[r])
		delete(x.began, r)
		x.spare = append(x.spare, r)
	}
}

// verdict says whether the tails of both devices are within the limit with paced moves.
func (l *latency) verdict() verdict {
	none, paced := l.Rows[0], l.Rows[len(l.Rows)-1]
	primary, flash := ratio(paced.Primary, none.Primary), ratio(paced.Flash, none.Flash)
	return verdict{
		paced.Moved > 0 && primary <= tailLimit && flash <= tailLimit,
		fmt.Sprintf("p99 %.2f times as long while sets are moved from the %s, %.2f times on flash (%.1f)", primary, l.Drive, flash, tailLimit),
	}
}

func ratio(a, b waits) float64 { return float64(a.P99) / float64(b.P99) }

// printLatencies writes a table, and returns whether all limits are kept.
func printLatencies(all []*latency) bool {
	if len(all) == 0 {
		return true
	}
	fmt.Println()
	fmt.Println("| primary | moves | MiB/s | busy | primary: mean | p99 | flash: mean | p99 |")
	fmt.Println("|---|---|--:|--:|--:|--:|--:|--:|")
	for _, l := range all {
		for _, r := range l.Rows {
			fmt.Printf("| %s | %s | %.2f | %.0f %% | %v | %v | %v | %v |\n", l.Drive, r.Pacing, r.Speed/mib, 100*r.Busy,
				round(r.Primary.Mean), round(r.Primary.P99), round(r.Flash.Mean), round(r.Flash.P99))
		}
	}
	good := true
	fmt.Println()
	for _, l := range all {
		v := l.verdict()
		mark := "reached"
		if !v.Reached {
			mark, good = "MISSED", false
		}
		fmt.Printf("* %s: %s\n", mark, v.Text)
	}
	return good
}

func round(d time.Duration) time.Duration {
	if d > 10*time.Millisecond {
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}
