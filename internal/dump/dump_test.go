package dump

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/pool"
)

// rig is a pool on two files whose guest has died: some of it is in the trees,
// some in the journal only, some in the flush log and the region only.
type rig struct {
	t      *testing.T
	paths  []string
	region string
	held   *pool.Pool // until die
	run    context.CancelFunc
	ran    chan error
}

const rows = 1000

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, region: filepath.Join(dir, "region"), ran: make(chan error, 1)}
	for _, name := range []string{"one", "two"} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(p, 64<<20); err != nil {
			t.Fatal(err)
		}
		r.paths = append(r.paths, p)
	}
	ctx := context.Background()
	devs := r.open()
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: devs, LogBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	p, err := pool.Open(ctx, pool.OpenOptions{Devices: devs, RegionPath: r.region, CacheBytes: 1 << 20, Owner: "a", Interval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	r.held = p
	run, cancel := context.WithCancel(ctx)
	r.run = cancel
	go func() { r.ran <- p.Run(run) }()
	if _, err := p.CreateVolume(ctx, "v", 16<<20); err != nil {
		t.Fatal(err)
	}
	v, err := p.Volume("v")
	r.must(err)
	r.write(v, 0, 20)
	r.must(p.Fold(ctx))
	r.write(v, 10, 12)
	r.must(p.Commit(ctx))
	r.write(v, 30, 33)
	r.must(v.Flush(ctx))
	r.write(v, 40, 42)
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) open() (devs []hpdi.Device) {
	for _, p := range r.paths {
		d, err := file.Open(p, file.Options{Lock: true})
		r.must(err)
		devs = append(devs, d)
	}
	return devs
}

func (r *rig) write(v block.Volume, from, to int64) {
	r.t.Helper()
	for lba := from; lba < to; lba++ {
		w, err := v.Stage(context.Background(), lba*block.Size, block.Size)
		r.must(err)
		for _, b := range w.Buffers() {
			for i := range b {
				b[i] = byte(lba + 1)
			}
		}
		r.must(w.Commit(context.Background()))
	}
}

// die leaves devices and region as a guest does that ends at once.
func (r *rig) die() {
	r.t.Helper()
	r.run()
	r.must(<-r.ran)
	r.must(r.held.Release(context.Background()))
}

// flip changes a byte of a file.
func (r *rig) flip(path string, at int64) {
	r.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	r.must(err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	r.must(err)
	b[0] ^= 0x10
	_, err = f.WriteAt(b[:], at)
	r.must(errors.Join(err, f.Close()))
}

// damaged expects exactly one finding, which contains want; none if want is
// empty.
func (r *rig) damaged(f Found, err error, want string) {
	r.t.Helper()
	r.must(err)
	if want == "" && len(f.Damage) > 0 || want != "" && (len(f.Damage) != 1 || !strings.Contains(f.Damage[0], want)) {
		r.t.Errorf("damage %q, want %q", f.Damage, want)
	}
}

var all = Options{Limit: rows}

func TestLockedDevice(t *testing.T) {
	r := newRig(t)
	if _, err := ReadLabels(r.paths[0], all); !errors.Is(err, hpdi.ErrLocked) {
		t.Errorf("a device that a guest has: %v", err)
	}
	live := Options{Limit: rows, Live: true}
	s, err := ReadSuperblocks(r.paths[0], live)
	r.damaged(s.Found, err, "")
	if !s.Live {
		t.Error("does not say that it looked at a live device")
	}
	x, err := ReadRegion(r.region, all) // needs no lock
	r.damaged(x.Found, err, "")
	if x.State != "serving" || len(x.Records) != 5 {
		t.Errorf("region %s with %d records", x.State, len(x.Records))
	}
	r.die()
}

func TestLabelsAndSuperblocks(t *testing.T) {
	r := newRig(t)
	r.die()
	l, err := ReadLabels(r.paths[1], all)
	r.damaged(l.Found, err, "")
	if c := l.Copies[1]; len(l.Copies) != 2 || !c.Valid || c.Name != "p" || c.Owner != "a" || c.Number != 2 || c.Blocks != 16384 {
		t.Errorf("labels %+v", l.Copies)
	}
	s, err := ReadSuperblocks(r.paths[0], all)
	r.damaged(s.Found, err, "")
	var wins []uint64
	for _, x := range s.Slots {
		if x.Wins {
			wins = append(wins, x.Generation)
		} else if x.Why == "" {
			t.Errorf("block %d does not win and does not say why", x.Block)
		}
	}
	if len(s.Slots) != 4 || len(wins) != 2 || wins[0] != wins[1] {
		t.Errorf("superblocks %+v", s.Slots)
	}
	at := cp.SuperblockAt(wins[0])
	r.flip(r.paths[0], int64(at[1])*block.Size+70)
	s, err = ReadSuperblocks(r.paths[0], all)
	r.damaged(s.Found, err, "checksum mismatch")
	r.flip(r.paths[0], 70)
	l, err = ReadLabels(r.paths[0], all)
	r.damaged(l.Found, err, "label at block 0")
	r.flip(r.paths[0], 128*block.Size+70)
	if s, err = ReadSuperblocks(r.paths[0], all); err != nil || len(s.Damage) != 2 || !s.Slots[0].Wins && !s.Slots[2].Wins {
		t.Errorf("without a label: %v, %+v", err, s)
	}
}

func TestJournal(t *testing.T) {
	r := newRig(t)
	r.die()
	j, err := ReadJournal(r.paths[0], 0, all)
	r.damaged(j.Found, err, "")
	n := len(j.Records)
	if n < 2 || j.Records[0].Kind != "fold" || !j.Records[0].Used || j.Records[n-1].Mappings != 2 || j.End.Next != j.Records[n-1].Number+1 {
		t.Fatalf("journal %+v", j)
	}
	for i := 1; i < n; i++ {
		if j.Records[i].Prev != j.Records[i-1].Sum || j.Records[i].Number != j.Records[i-1].Number+1 {
			t.Errorf("records %+v and %+v do not follow each other", j.Records[i-1], j.Records[i])
		}
	}
	last := j.Records[n-1]
	if k, err := ReadJournal(r.paths[0], last.Number, Options{Limit: 1}); err != nil || len(k.Records) != 1 || k.Records[0] != last || k.More != 0 {
		t.Errorf("from %d on: %+v, %v", last.Number, k, err)
	}
	if k, err := ReadJournal(r.paths[0], 0, Options{Limit: 1}); err != nil || len(k.Records) != 1 || k.More != n-1 {
		t.Errorf("one of %d: %+v, %v", n, k, err)
	}
	if _, err := ReadJournal(r.paths[1], 0, all); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("of the second device: %v", err)
	}
	// The last record torn is where the chain ends; one before it is damage.
	r.flip(r.paths[0], int64(last.Block)*block.Size+100)
	j, err = ReadJournal(r.paths[0], 0, all)
	r.damaged(j.Found, err, "")
	if len(j.Records) != n-1 || !strings.Contains(j.End.Why, "not whole") {
		t.Errorf("torn: %+v", j)
	}
	r.flip(r.paths[0], int64(last.Block)*block.Size+100)
	first := int64(j.Records[0].Block) * block.Size
	r.flip(r.paths[0], first+70)
	j, err = ReadJournal(r.paths[0], 0, all)
	r.damaged(j.Found, err, "unreadable although record")
	// What lies behind the end of a record does not matter.
	r.flip(r.paths[0], first+70)
	r.flip(r.paths[0], first+block.Size-1)
	j, err = ReadJournal(r.paths[0], 0, all)
	r.damaged(j.Found, err, "")
	if len(j.Records) != n {
		t.Errorf("%d records, want %d", len(j.Records), n)
	}
}

func TestFlushLog(t *testing.T) {
	r := newRig(t)
	r.die()
	l, err := ReadFlushLog(r.paths[0], all)
	r.damaged(l.Found, err, "")
	records, payload := 0, 0
	for _, b := range l.Batches {
		records += b.Records
		payload += b.Payload
	}
	if len(l.Batches) == 0 || payload < 3 || records < 3 || l.End.Next != l.Batches[len(l.Batches)-1].Number+1 {
		t.Fatalf("flush log %+v", l)
	}
	r.flip(r.paths[0], l.Batches[len(l.Batches)-1].At+70)
	k, err := ReadFlushLog(r.paths[0], all)
	r.damaged(k.Found, err, "")
	if len(k.Batches) != len(l.Batches)-1 || !strings.Contains(k.End.Why, "not whole") {
		t.Errorf("torn: %+v", k)
	}
}

// Sections that come and go are shown, with what an index says of itself; one that says
// nothing good is no damage.
func TestRegionSections(t *testing.T) {
	r := newRig(t)
	x, err := ReadRegion(r.region, all)
	r.must(err)
	if x.Sections[0].Kind != "operation log" || x.Sections[0].Offset != x.Log.Offset {
		t.Errorf("%+v", x.Sections)
	}
	j := section(t, x, "unfolded journal")
	if k := j.Journal; k == nil || !k.Whole || k.Records == 0 || k.Last-k.First+1 != uint64(k.Records) ||
		k.Used > k.Bytes || k.Bytes > j.Length || k.Pool != x.Log.Pool {
		t.Errorf("%+v, %+v", j, k)
	}
	c := section(t, x, "cache")
	if f := c.Cache; c.Why != "" || f == nil || f.Pool != x.Log.Pool || f.Shards != 1 || int64(f.Frames*block.Size) > c.Length || int64(f.Frames*block.Size) < c.Length*9/10 {
		t.Errorf("%+v, %+v", c, f)
	}
	r.must(r.held.SetSharing(context.Background(), "v", 8))
	v, err := r.held.Volume("v")
	r.must(err)
	r.write(v, 50, 90)
	r.must(r.held.Fold(context.Background()))
	r.must(r.held.IndexAll(context.Background()))
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	s := section(t, x, "index of fingerprints")
	if s.Kind != "index of fingerprints" || s.Why != "" || s.Index == nil || s.Index.Entries == 0 || s.Index.Bytes > s.Length ||
		s.Index.Every != 1 || s.Index.State != "complete" || s.Index.Pool != x.Log.Pool || s.Index.Successor {
		t.Errorf("%+v, %+v", s, s.Index)
	}
	r.die()
	for _, at := range []int64{s.Offset + 70, s.Offset + 128 + 70, c.Offset + 70, c.Offset + block.Size + 70, j.Offset + 70, j.Offset + 128 + 70} {
		r.flip(r.region, at)
	}
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	for _, kind := range []string{"index of fingerprints", "cache", "unfolded journal"} {
		if s := section(t, x, kind); s.Index != nil || s.Cache != nil || s.Journal != nil || !strings.Contains(s.Why, "checksum") {
			t.Errorf("%+v", s)
		}
	}
}

// Sessions are shown, and the tags of their changes; what is damaged of them is.
func TestSessions(t *testing.T) {
	r := newRig(t)
	ctx := context.Background()
	v, err := r.held.Volume("v")
	r.must(err)
	s, err := v.OpenSession(ctx, 0xabc, 2, 16)
	r.must(err)
	tag := block.Tag{Session: 0xabc, Queue: 1, Slot: 3, Counter: 7}
	r.must(v.Trim(ctx, 0, block.Size, tag))
	x, err := ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	f := section(t, x, "sessions").Sessions
	want := SessionInfo{ID: "0000000000000abc", Volume: 1, Queues: 2, Slots: 16, Since: x.Log.Head - 2, Used: 1, Last: 7}
	if f == nil || f.Pool != x.Log.Pool || len(f.List) != 1 || f.List[0] != want {
		t.Fatalf("%+v", f)
	}
	rec := x.Records[len(x.Records)-2]
	if rec.Kind != "tag" || rec.Tag == nil || *rec.Tag != (TagFacts{Session: "0000000000000abc", Queue: 1, Slot: 3, Counter: 7, Records: 1}) || !rec.OK {
		t.Errorf("%+v, %+v", rec, rec.Tag)
	}
	s.Leave()
	r.die()
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	sec := section(t, x, "sessions")
	if l := sec.Sessions.List; len(l) != 1 || l[0].Left == 0 {
		t.Errorf("%+v", l)
	}
	r.flip(r.region, sec.Offset+4096+9)
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "session 0000000000000abc: its checksum")
	r.flip(r.region, sec.Offset+70)
	r.flip(r.region, sec.Offset+2048+70)
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	if sec := section(t, x, "sessions"); sec.Sessions != nil || !strings.Contains(sec.Why, "checksum") {
		t.Errorf("%+v", sec)
	}
}

// section returns the section of a kind, of which there is one.
func section(t *testing.T, x *Region, kind string) Section {
	t.Helper()
	var found []Section
	for _, s := range x.Sections {
		if s.Kind == kind {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%+v", x.Sections)
	}
	return found[0]
}

func TestRegion(t *testing.T) {
	r := newRig(t)
	r.die()
	x, err := ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	n := len(x.Records)
	if x.State != "released" || n != 5 || x.Log == nil || x.Log.Head != x.Records[n-1].Seq || x.Records[n-1].LBA != 41 || x.Records[n-1].Verdict != "good" {
		t.Fatalf("region %+v", x)
	}
	arena := x.Log.Offset + 4096 + int64(x.Log.Slots)*64
	slot := func(ring int, seq uint64) int64 {
		at := x.Log.Offset + 4096 + int64(seq%x.Log.Slots)*64
		if ring == 1 {
			at = arena + int64(x.Log.Extents)*block.Size + int64(seq%x.Log.Slots)*64
		}
		return at
	}
	last := x.Records[n-1]
	r.flip(r.region, slot(0, last.Seq)+10)
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "")
	if len(x.Notes) != 1 || x.Records[n-1].Verdict != "one copy" {
		t.Errorf("one bad copy: %q, %+v", x.Notes, x.Records[n-1])
	}
	r.flip(r.region, slot(1, last.Seq)+10)
	x, err = ReadRegion(r.region, all)
	r.damaged(x.Found, err, "both copies are bad")
	if len(x.Records) != n || x.Records[n-1].OK || !x.Records[n-2].OK {
		t.Errorf("two bad copies: %+v", x.Records)
	}
	r.flip(r.region, slot(0, last.Seq)+10)
	r.flip(r.region, arena+int64(last.Extent)*block.Size+99)
	x, err = ReadRegion(r.region, Options{Limit: 2})
	r.damaged(x.Found, err, "payload of block 41 of volume 1")
	if len(x.Records) != 2 || x.More != n-2 {
		t.Errorf("two of %d: %d and %d more", n, len(x.Records), x.More)
	}
	r.flip(r.region, 70)
	if x, err = ReadRegion(r.region, all); err != nil || len(x.Damage) != 2 || x.Headers[0].Valid || !x.Headers[1].Wins || x.Log == nil {
		t.Errorf("one header bad: %v, %+v", err, x)
	}
	r.flip(r.region, 4096+70)
	if x, err = ReadRegion(r.region, all); err != nil || len(x.Damage) != 2 || x.Log != nil {
		t.Errorf("both headers bad: %v, %+v", err, x)
	}
	for _, size := range []int64{0, 4096, 20000, 100000} {
		p := filepath.Join(t.TempDir(), "short")
		b, err := os.ReadFile(r.region)
		r.must(err)
		b[70] ^= 0x10
		r.must(os.WriteFile(p, b[:size], 0o600))
		if x, err := ReadRegion(p, all); err == nil && len(x.Damage) == 0 {
			t.Errorf("%d bytes of a region: %+v", size, x)
		}
	}
}

func TestMapAndCounts(t *testing.T) {
	r := newRig(t)
	r.die()
	m, err := ReadMap(r.paths, "", nil, all)
	r.damaged(m.Found, err, "")
	if len(m.Volumes) != 1 || m.Volumes[0].Name != "v" || m.Volumes[0].Used != 20 || len(m.Pages) != 0 || m.Unfolded != 2 {
		t.Errorf("volumes %+v", m)
	}
	m, err = ReadMap([]string{r.paths[1], r.paths[0]}, "v", nil, all) // in any order
	r.damaged(m.Found, err, "")
	if len(m.Pages) != 4 || m.Pages[3].Level != 0 || m.Pages[3].Entries != 20 {
		t.Errorf("pages %+v", m.Pages)
	}
	for lba, from := range map[uint64]string{5: "tree", 10: "journal", 19: "tree", 100: "hole"} {
		b, err := ReadMap(r.paths, "v", &lba, all)
		r.damaged(b.Found, err, "")
		if b.Block == nil || b.Block.From != from || !b.Block.OK || len(b.Pages) != 4 {
			t.Errorf("block %d: %+v", lba, b.Block)
		}
	}
	if _, err := ReadMap(r.paths, "w", nil, all); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("no such volume: %v", err)
	}
	beyond := uint64(4096)
	if _, err := ReadMap(r.paths, "v", &beyond, all); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("no such block: %v", err)
	}
	if _, err := ReadMap(r.paths[:1], "v", nil, all); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("one of two devices: %v", err)
	}
	c, err := ReadCounts(r.paths, all)
	r.damaged(c.Found, err, "")
	total := uint64(0)
	for _, run := range c.Runs {
		total += run.Blocks
	}
	if len(c.Blocks) != 1 || c.Blocks[0].Count != 1 || c.Blocks[0].Blocks != total || total != 20 || c.Unfolded != 2 {
		t.Errorf("counts %+v", c)
	}
	r.spoil(t, m)
}

// spoil damages data, a leaf and a page of counts, one after the other.
func (r *rig) spoil(t *testing.T, m *Map) {
	five := uint64(5)
	b, err := ReadMap(r.paths, "v", &five, all)
	r.must(err)
	r.flipAt(b.Block.InTree)
	b, err = ReadMap(r.paths, "v", &five, all)
	r.damaged(b.Found, err, "block 5: ")
	if b.Block.OK {
		t.Errorf("damaged data: %+v", b.Block)
	}
	r.flipAt(m.Pages[2].Place)
	x, err := ReadMap(r.paths, "v", nil, all)
	r.damaged(x.Found, err, "metadata page of level 1")
	if len(x.Pages) != 4 || x.Pages[2].OK || !x.Pages[1].OK || !x.Pages[3].OK || !strings.Contains(x.Pages[2].Why, "from its twin") {
		t.Errorf("page damaged in its first place: %+v", x.Pages)
	}
	r.flipAt(m.Pages[2].Twin)
	x, err = ReadMap(r.paths, "v", nil, all)
	r.damaged(x.Found, err, "metadata page of level 1")
	if len(x.Pages) != 3 || x.Pages[2].OK || !x.Pages[1].OK {
		t.Errorf("damaged page: %+v", x.Pages)
	}
	r.flipAt(m.Pages[2].Place) // back
	x, err = ReadMap(r.paths, "v", nil, all)
	r.damaged(x.Found, err, "its twin")
	if len(x.Pages) != 4 || x.Pages[2].OK || !x.Pages[3].OK {
		t.Errorf("page damaged in its second place: %+v", x.Pages)
	}
	devs := r.open()
	set := devices.NewSet(devs)
	l, err := pool.ReadLabel(devs[0])
	r.must(err)
	sb, err := cp.ReadSuperblock(set, l.Pool)
	r.must(errors.Join(err, set.Close()))
	r.flipAt(sb.Devices[0].Counts.Phys.String())
	r.flipAt(sb.Devices[0].Counts.Second().Phys.String())
	c, err := ReadCounts(r.paths, all)
	r.damaged(c.Found, err, "metadata page of level 3")
	if len(c.Bad) != 1 || len(c.Runs) != 0 {
		t.Errorf("damaged counts: %+v", c)
	}
}

// flipAt changes a byte of the block at an address as messages have it.
func (r *rig) flipAt(place string) {
	r.t.Helper()
	var dev int
	var n int64
	place, _, _ = strings.Cut(place, " ")
	d, b, _ := strings.Cut(place, ":")
	for _, c := range d {
		dev = dev*10 + int(c-'0')
	}
	for _, c := range b {
		n = n*10 + int64(c-'0')
	}
	r.flip(r.paths[dev], n*block.Size+9)
}
