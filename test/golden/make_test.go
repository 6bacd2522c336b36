package golden

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/pool"
)

var makeSet = flag.Int("make", 0, "number of a new set of pools to make in testdata")

// The boots of the host that a pool was left on, and of a later one, which has no region.
const (
	boot  = "golden"
	later = "later"
)

// content is what the volumes of a pool hold, by their SHA-256.
type content struct {
	Region  map[string]string `json:"with_region"`
	Flushed map[string]string `json:"without_region"` // what flushes covered
	// Session is a client of volume v whose change with tagged is in the log; sets before 2 have none.
	Session block.SessionID `json:"session,omitempty"`
}

// tagged is the place and number of the submission that a session has in the log.
var tagged = block.Tag{Queue: 1, Slot: 3, Counter: 7}

// The shape of the session.
const (
	sessionQueues = 2
	sessionSlots  = 8
)

// kind is a kind of pool.
type kind struct {
	name    string
	devices []string // files; those of a mirror follow each other
	copies  int
	flash   string // a file that becomes flash
	shares  bool
}

var kinds = []kind{
	{name: "plain", devices: []string{"disk0", "disk1"}, copies: 1},
	{name: "shared", devices: []string{"disk0"}, copies: 1, shares: true},
	{name: "mirror", devices: []string{"disk0", "disk1"}, copies: 2},
	{name: "flash", devices: []string{"disk0"}, copies: 1, flash: "flash0"},
}

func (k kind) files() []string {
	f := append([]string{}, k.devices...)
	if k.flash != "" {
		f = append(f, k.flash)
	}
	return append(f, regionName)
}

const deviceSize = 48 << 20

// open opens the files of a pool as its devices, those that are flash last.
func (k kind) open(dir string) (devs []hpdi.Device, err error) {
	names := k.devices
	if k.flash != "" {
		names = append(names[:len(names):len(names)], k.flash)
	}
	for _, name := range names {
		d, err := openFile(dir, name)
		if err != nil {
			return nil, err
		}
		devs = append(devs, d)
	}
	return mirror.Assemble(devs, mirror.Options{})
}

func openFile(dir, name string) (hpdi.Device, error) {
	return file.Open(filepath.Join(dir, name), file.Options{Lock: true})
}

// life is an open pool and its goroutine.
type life struct {
	*pool.Pool
	stop context.CancelFunc
	done chan error
}

func (k kind) begin(dir, boot string) (*life, error) {
	devs, err := k.open(dir)
	if err != nil {
		return nil, err
	}
	p, err := pool.Open(context.Background(), pool.OpenOptions{
		Devices: devs, RegionPath: filepath.Join(dir, regionName), CacheBytes: 8 << 20,
		Owner: "a", BootID: boot, IndexBytes: dedup.MinIndex,
	})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &life{p, stop, make(chan error, 1)}
	go func() { l.done <- p.Run(ctx) }()
	return l, nil
}

// end stops the pool's goroutine, so that it can be released or closed.
func (l *life) end() error {
	l.stop()
	return <-l.done
}

func write(v block.Volume, off int64, p []byte) error { return writeTagged(v, off, p, block.Tag{}) }

func writeTagged(v block.Volume, off int64, p []byte, tag block.Tag) error {
	w, err := v.Stage(context.Background(), off, len(p))
	if err != nil {
		return err
	}
	for _, b := range w.Buffers() {
		p = p[copy(b, p):]
	}
	w.SetTag(tag)
	return w.Commit(context.Background())
}

// sums returns the SHA-256 of what each volume holds.
func (l *life) sums() (map[string]string, error) {
	out := map[string]string{}
	for _, i := range l.Volumes() {
		v, err := l.Volume(i.Name)
		if err != nil {
			return nil, err
		}
		h := sha256.New()
		p := make([]byte, 1<<20)
		for off := int64(0); off < i.Size; off += int64(len(p)) {
			p = p[:min(int64(cap(p)), i.Size-off)]
			if err := v.Read(context.Background(), p, off); err != nil {
				return nil, fmt.Errorf("volume %s at %d: %w", i.Name, off, err)
			}
			h.Write(p)
		}
		out[i.Name] = hex.EncodeToString(h.Sum(nil))
	}
	return out, nil
}

// build makes a pool of the kind in a directory and leaves it released.
func (k kind) build(dir string, rng *rand.Rand) (c content, err error) {
	ctx := context.Background()
	for _, name := range k.files()[:len(k.files())-1] {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			return c, err
		}
		if err := os.Truncate(filepath.Join(dir, name), deviceSize); err != nil {
			return c, err
		}
	}
	var devs []hpdi.Device
	for _, name := range k.devices {
		d, err := openFile(dir, name)
		if err != nil {
			return c, err
		}
		devs = append(devs, d)
	}
	if k.copies > 1 {
		if _, err := mirror.Create(devs); err != nil {
			return c, err
		}
		if devs, err = mirror.Assemble(devs, mirror.Options{}); err != nil {
			return c, err
		}
	}
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: devs, LogBytes: 1 << 20}); err != nil {
		return c, err
	}
	for _, d := range devs {
		if err := d.Close(); err != nil {
			return c, err
		}
	}
	one := k
	one.flash = ""
	l, err := one.begin(dir, boot)
	if err != nil {
		return c, err
	}
	return c, k.fill(ctx, l, dir, rng, &c)
}

// fill writes what is to be there in each place: trees, journal, flushed log, log.
func (k kind) fill(ctx context.Context, l *life, dir string, rng *rand.Rand, c *content) (err error) {
	noise := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	// Few bytes that differ, so that the file in the repository stays small.
	data := func(n int) []byte { return bytes.Repeat(noise(16), n/16) }
	if k.flash != "" {
		d, err := openFile(dir, k.flash)
		if err != nil {
			return err
		}
		if err := l.AddFlash(ctx, d, 64<<10); err != nil {
			return err
		}
	}
	create := l.CreateVolume
	if k.shares {
		create = func(ctx context.Context, name string, size int64) (pool.VolumeInfo, error) {
			return l.CreateSharing(ctx, name, size, 2)
		}
	}
	if _, err := create(ctx, "v", 8<<20); err != nil {
		return err
	}
	if _, err := create(ctx, "empty", 4<<20); err != nil {
		return err
	}
	v, err := l.Volume("v")
	if err != nil {
		return err
	}
	series := data(64 << 10)
	steps := []func() error{
		// In the trees.
		func() error { return write(v, 0, series) },
		func() error { return write(v, 1<<20, data(32<<10)) },
		func() error { return write(v, 4<<20+512, data(1024)) },
		func() error { return l.Commit(ctx) },
		func() error { return l.Fold(ctx) },
		func() error { return k.toFlash(ctx, l) },
		// In the journal.
		func() error { return write(v, 2<<20, series) },
		func() error { return v.Trim(ctx, 1<<20, 16<<10, block.Tag{}) },
		func() error { return l.Commit(ctx) },
		// In the flush log, and then only in the region.
		func() error { return write(v, 3<<20, data(8<<10)) },
		func() error { return v.Flush(ctx) },
	}
	for i, f := range steps {
		if err := f(); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	if c.Flushed, err = l.sums(); err != nil {
		return err
	}
	// No consistency point comes any more: the goroutine has ended.
	if err := l.end(); err != nil {
		return err
	}
	if err := write(v, 5<<20, data(8<<10)); err != nil {
		return err
	}
	if err := write(v, 0, data(4<<10)); err != nil {
		return err
	}
	c.Session = block.SessionID(rng.Uint64() | 1)
	session, err := v.OpenSession(ctx, c.Session, sessionQueues, sessionSlots)
	if err != nil {
		return err
	}
	tag := tagged
	tag.Session = c.Session
	if err := writeTagged(v, 6<<20, data(8<<10), tag); err != nil {
		return err
	}
	session.Leave()
	if c.Region, err = l.sums(); err != nil {
		return err
	}
	return l.Release(ctx)
}

// toFlash pins a part of a volume to flash and waits until it is there.
func (k kind) toFlash(ctx context.Context, l *life) error {
	if k.flash == "" {
		return nil
	}
	if _, err := l.ChangeFlash(ctx, pool.FlashChange{Pin: []pool.FlashPin{{Volume: "v", Length: 256 << 10}}}); err != nil {
		return err
	}
	for began := time.Now(); l.Flash().Used == 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			return fmt.Errorf("nothing has come to flash: %+v", l.Flash())
		}
	}
	return nil
}

// TestMake makes a set of pools when it is told to.
func TestMake(t *testing.T) {
	if *makeSet == 0 {
		t.Skip("makes a new set of pools with -make N")
	}
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			base := filepath.Join("testdata", fmt.Sprintf("%s-%d", k.name, *makeSet))
			if _, err := os.Stat(base + ".golden"); err == nil {
				t.Fatalf("set %d is there: sets are never made anew", *makeSet)
			}
			dir := t.TempDir()
			c, err := k.build(dir, rand.New(rand.NewPCG(uint64(*makeSet), 1)))
			if err != nil {
				t.Fatal(err)
			}
			var paths []string
			for _, f := range k.files() {
				paths = append(paths, filepath.Join(dir, f))
			}
			var packed bytes.Buffer
			if err := pack(&packed, paths); err != nil {
				t.Fatal(err)
			}
			text, err := json.MarshalIndent(c, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(base+".json", append(text, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(base+".golden", packed.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d bytes", packed.Len())
		})
	}
}
