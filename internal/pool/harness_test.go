package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// rig runs a pool on crashable devices, without Run: jobs are served one by
// one by a goroutine that does nothing else, so that every device operation
// happens at a place that the seed decides.
type rig struct {
	t       testing.TB
	clock   *blocktest.Clock
	devs    []*blocktest.Crash
	region  string
	boot    int
	battery bool
	// cacheBytes is the cache of the next guest.
	cacheBytes int64
	warm       bool // the cache of a guest that died is left to the next one
	// wrap, if set, stands between the pool and device i.
	wrap func(i int, d hpdi.Device) hpdi.Device
	// gather, if set, makes the pool's devices out of devs.
	gather     func() []hpdi.Device
	readOnly   bool // mirrors are made for reading only
	acceptLoss bool
	cleaning   CleanerOptions
	scrubbing  ScrubOptions
	removal    RemovalOptions
	interval   time.Duration
	// fingerprint is the pool's; repeats makes exercise write much of what it has
	// written before again.
	fingerprint func([]byte) dedup.Fingerprint
	indexBytes  int64
	repeats     bool
	// byRecord makes each second guest that dies write a restart record right before, so that
	// others that are found are old, and opens the pool by what is found.
	byRecord bool
	deaths   int
	recalled int // how often the pool was opened by a record
	*Pool
	serving chan struct{}
}

const (
	testLog  = minLog
	testSize = 256 << 20

	cacheSize = 4 << 20
)

// few returns how many of n rounds of a test are made. With the race detector, which
// makes all of them slow and has nothing more to find in one goroutine's work, it is
// an eighth: `make test` makes the others without it.
func few(n int) int {
	if raced {
		return (n + 7) / 8
	}
	return n
}

// oneIn is the distance of the operations at which a sweep lets something fail: with the
// race detector, for the same reason, one in n.
func oneIn(n int) int {
	if raced {
		return n
	}
	return 1
}

// long lets a test run beside other long ones, each with devices of its own. With the
// race detector it does not: packages run beside each other then.
func long(t *testing.T) {
	if !raced {
		t.Parallel()
	}
}

// soak asks for the long variants of tests.
var soak = os.Getenv("POLLUX_SOAK") == "1"

func newRig(t testing.TB, devices int, size int64) *rig {
	t.Helper()
	return newRigWithLog(t, devices, size, testLog)
}

func newRigWithLog(t testing.TB, devices int, size, log int64) *rig {
	t.Helper()
	r := newBareRig(t, devices, size)
	_, err := Create(context.Background(), CreateOptions{Name: "p", Identity: "a", Devices: r.devices(), LogBytes: log})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// newBareRig returns a rig whose devices are blank.
func newBareRig(t testing.TB, devices int, size int64) *rig {
	t.Helper()
	r := &rig{t: t, clock: blocktest.NewClock(), region: filepath.Join(t.TempDir(), "region"), boot: 1, cacheBytes: cacheSize}
	for i := range devices {
		r.devs = append(r.devs, blocktest.NewCrashWith(blocktest.CrashOptions{
			Name: fmt.Sprintf("disk%d", i), Size: size, Seed: uint64(i), Clock: r.clock, Direct: true}))
	}
	r.byRecord = true
	return r
}

// record returns a restart record of the open pool.
func (r *rig) record() *restart.Record {
	r.t.Helper()
	rec, err := r.Pool.Restart(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range rec.Devices {
		c := &rec.Devices[i].Copies[0]
		c.File = restart.File{Size: int64(rec.Devices[i].Blocks) * block.Size, BlockSize: block.Size, Born: 1}
	}
	return rec
}

// keepRecord stores a restart record in the region.
func (r *rig) keepRecord() {
	r.t.Helper()
	rec := r.record()
	r.deaths++
	rec.Number = uint64(r.deaths)
	enc, err := rec.Encode()
	if err == nil {
		err = r.Pool.KeepRecord(enc)
	}
	if err != nil && !errors.Is(err, block.ErrInvalid) { // that is, no room for it in the header
		r.t.Fatal(err)
	}
}

// newCache takes the cache out of the region, if there is one, so that the next guest finds
// none.
func (r *rig) newCache() {
	q, err := region.Open(r.region, false)
	if err != nil {
		return
	}
	for _, s := range q.Sections(region.SectionCache) {
		if err := q.RemoveSection(s); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := q.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// forget empties the cache of the open pool.
func (r *rig) forget() {
	c := r.Pool.cache.Cache
	c.Close()
	c.Move(make([]byte, cacheSize))
}

func (r *rig) devices() []hpdi.Device {
	if r.gather != nil {
		return r.gather()
	}
	var devs []hpdi.Device
	for i, d := range r.devs {
		if devs = append(devs, d); r.wrap != nil {
			devs[i] = r.wrap(i, d)
		}
	}
	return devs
}

func (r *rig) options() OpenOptions {
	return OpenOptions{Devices: r.devices(), RegionPath: r.region, CacheBytes: r.cacheBytes, Owner: "a", BatteryBacked: r.battery, BootID: fmt.Sprint(r.boot), AcceptLoss: r.acceptLoss, Cleaner: r.cleaning, Scrub: r.scrubbing, Removal: r.removal, Interval: r.interval, Fingerprint: r.fingerprint, IndexBytes: r.indexBytes}
}

// open opens the pool and starts to serve jobs.
func (r *rig) open() error { return r.openWith(r.options()) }

func (r *rig) openWith(o OpenOptions) error {
	var p *Pool
	var err error = &RecordError{}
	if r.byRecord && !o.AcceptLoss && o.Restart == nil {
		if rec, e := ReadRecord(o.RegionPath); e == nil {
			o.Restart = rec
			p, err = Open(context.Background(), o)
			if err == nil {
				r.recalled++
			}
		}
	}
	if untrue := (*RecordError)(nil); errors.As(err, &untrue) {
		if r.byRecord {
			o.Restart = nil
		}
		p, err = Open(context.Background(), o)
	}
	if err != nil {
		return err
	}
	r.Pool = p
	r.serving = make(chan struct{})
	go func() {
		defer close(r.serving)
		for j := range p.jobs {
			j.done <- p.runJob(j)
		}
	}()
	return nil
}

// faulty puts devices that misbehave by rule below the pool from the next open
// on. Their rules are gone after each open.
func (r *rig) faulty() (faults []*blocktest.Fault) {
	faults = make([]*blocktest.Fault, len(r.devs))
	r.wrap = func(i int, d hpdi.Device) hpdi.Device {
		faults[i] = blocktest.NewFault(d, uint64(i))
		return faults[i]
	}
	return faults
}

func (r *rig) mustOpen() {
	r.t.Helper()
	if err := r.open(); err != nil {
		r.t.Fatal(err)
	}
}

// stop ends the goroutine that serves jobs.
func (r *rig) stop() {
	close(r.Pool.jobs)
	<-r.serving
	close(r.Pool.stopped)
}

// reopenDevices gives the rig's devices to whoever comes next.
func (r *rig) reopenDevices() {
	for i, d := range r.devs {
		r.devs[i] = d.Reopen()
	}
}

// reopen makes the devices of a closed pool ready to be opened again.
func (r *rig) reopen() {
	r.reopenDevices()
	if !r.warm {
		r.newCache()
	}
}

// die leaves the pool as a killed guest would: the host lives, so the region
// and everything written to the devices stay.
func (r *rig) die() {
	r.t.Helper()
	if r.byRecord && r.deaths%2 == 0 && r.Pool.owned() == nil {
		r.keepRecord()
	} else {
		r.deaths++
	}
	r.stop()
	if err := r.Pool.free(); err != nil {
		r.t.Log(err) // a device whose power is off cannot close its queues well
	}
	r.reopen()
}

// cutPower ends the host: the region is gone, and the devices are as the cut
// left them.
func (r *rig) cutPower(mode blocktest.CutMode, seed uint64) {
	r.stop()
	_ = r.Pool.free()
	clock := blocktest.NewClock()
	for i, d := range r.devs {
		r.devs[i] = d.CutTo(clock, mode, seed+uint64(i))
	}
	r.clock = clock
	r.boot++
}

// comesBack opens the pool after a death or power cut. Volume "v" must hold what the
// model says of it, the first least changes at least, and the pool must be consistent.
func (r *rig) comesBack(m *blocktest.Model, least int, what string) block.Volume {
	r.t.Helper()
	if err := r.open(); err != nil {
		r.t.Fatalf("%s: open: %v", what, err)
	}
	v, err := r.Volume("v")
	if err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	n, err := m.CheckPrefix(blockReader(v), least)
	if err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	m.Truncate(n)
	if r.mustCheck(); r.t.Failed() {
		r.t.Fatal(what)
	}
	return v
}

// nextLife ends the guest's life after a round, or every third time the host's, and opens
// the pool again, see comesBack.
func (r *rig) nextLife(m *blocktest.Model, seed uint64, round int) block.Volume {
	r.t.Helper()
	least := m.Acked()
	if round%3 == 2 {
		least = m.Flushed()
		r.cutPower(blocktest.CutRandom, seed+uint64(round))
	} else {
		r.die()
	}
	return r.comesBack(m, least, fmt.Sprintf("seed %d round %d", seed, round))
}

// drawWrite begins a write of n bytes at off, of new content or, if the rig repeats, of
// what was written before.
func (r *rig) drawWrite(m *blocktest.Model, rng *rand.Rand, off int64, n int) (id int, data []byte) {
	if made := m.Len(); r.repeats && made > 0 && rng.IntN(2) == 0 {
		return m.Repeat(off, n, 1+rng.IntN(made))
	}
	return m.Write(off, n)
}

func (r *rig) volume(name string, size int64) block.Volume {
	r.t.Helper()
	if _, err := r.CreateVolume(context.Background(), name, size); err != nil {
		r.t.Fatal(err)
	}
	v, err := r.Volume(name)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

// mustCheck ends a test: the pool must be consistent down to the last byte.
func (r *rig) mustCheck() {
	r.t.Helper()
	report, err := r.Check(context.Background(), CheckOptions{Data: true})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range report.Problems {
		r.t.Error("check: ", p)
	}
}

// shut checks, closes and reopens nothing: the end of a test.
func (r *rig) shut() {
	r.t.Helper()
	r.mustCheck()
	r.stop()
	if err := r.Pool.Close(context.Background()); err != nil {
		r.t.Error(err)
	}
}

func write(v block.Volume, off int64, p []byte) error {
	w, err := v.Stage(context.Background(), off, len(p))
	if err != nil {
		return err
	}
	for _, b := range w.Buffers() {
		p = p[copy(b, p):]
	}
	return w.Commit(context.Background())
}

// blockReader reads single blocks of a volume, as models want them.
func blockReader(v block.Volume) func(block.Logical) ([]byte, error) {
	return func(lba block.Logical) ([]byte, error) {
		p := make([]byte, block.Size)
		return p, v.Read(context.Background(), p, int64(lba)*block.Size)
	}
}
