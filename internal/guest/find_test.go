package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/pool"
)

// shelf is a folder of pools' devices.
type shelf struct {
	t   *testing.T
	dir string
}

func (s *shelf) path(name string) string { return filepath.Join(s.dir, name) }

func (s *shelf) open(names ...string) (devs []hpdi.Device) {
	s.t.Helper()
	for _, n := range names {
		d, err := file.Open(s.path(n), file.Options{Lock: true})
		if err != nil {
			s.t.Fatal(err)
		}
		devs = append(devs, d)
	}
	return devs
}

// make makes a pool of files, each by itself or, by twos, mirrors.
func (s *shelf) make(name string, mirrored bool, files ...string) {
	s.t.Helper()
	for _, f := range files {
		if err := os.WriteFile(s.path(f), nil, 0o600); err != nil {
			s.t.Fatal(err)
		}
		if err := os.Truncate(s.path(f), 64<<20); err != nil {
			s.t.Fatal(err)
		}
	}
	devs := s.open(files...)
	if mirrored {
		var err error
		if devs, err = makeMirrors(devs, 2, memory{}); err != nil {
			s.t.Fatal(err)
		}
	}
	defer closeAll(devs)
	if _, err := pool.Create(context.Background(), pool.CreateOptions{Name: name, Identity: "a", Devices: devs, LogBytes: 1 << 20, Host: "here"}); err != nil {
		s.t.Fatal(err)
	}
}

// use opens a pool, makes a volume, and ends it somehow.
func (s *shelf) use(end func(*pool.Pool, context.Context) error, files ...string) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	devs, err := mirror.Assemble(s.open(files...), mirror.Options{Degraded: true})
	if err != nil {
		s.t.Fatal(err)
	}
	p, err := pool.Open(ctx, pool.OpenOptions{Devices: devs, RegionPath: s.path("region"), CacheBytes: 1 << 20, Owner: "a", Host: "here"})
	if err != nil {
		s.t.Fatal(err)
	}
	ran := make(chan error)
	go func() { ran <- p.Run(ctx) }()
	_, err = p.CreateVolume(ctx, fmt.Sprintf("v-%d", p.Epoch()), 1<<20)
	cancel()
	<-ran
	if e := end(p, context.Background()); err != nil || e != nil {
		s.t.Fatal(err, e)
	}
}

// find looks and returns what it has found of a pool.
func (s *shelf) find(name string, paths ...string) (p control.FoundPool, notes string) {
	s.t.Helper()
	if len(paths) == 0 {
		paths = []string{s.dir}
	}
	found, err := FindPools(paths, "")
	if err != nil {
		s.t.Fatal(err)
	}
	i := slices.IndexFunc(found.Pools, func(p control.FoundPool) bool { return p.Name == name })
	if i < 0 {
		s.t.Fatalf("no pool %s in %+v", name, found)
	}
	return found.Pools[i], strings.Join(append(found.Notes, found.Pools[i].Notes...), "\n")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What is found of a pool of two devices, wherever its life has ended.
func TestFindPools(t *testing.T) {
	s := &shelf{t, t.TempDir()}
	s.make("p", false, "p0", "p1")
	for name, content := range map[string]string{"text": "PLXlab", "empty": "", "half": "PLXlabel and no more"} {
		if err := os.WriteFile(s.path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(s.path("folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if p, _ := s.find("p"); p.State != control.FoundNotExported || p.Wants != 2 || len(p.Devices) != 2 || p.Guest != "a" || p.Host != "here" || p.Here || p.Region != "" {
		t.Errorf("made: %+v", p)
	}
	s.use((*pool.Pool).Release, "p0", "p1")
	p, _ := s.find("p")
	if p.State != control.FoundNotClosed || !p.Here || p.Region == "" || p.Epoch != 1 {
		t.Errorf("left with its log in the region: %+v", p)
	}
	s.use((*pool.Pool).Close, "p0", "p1")
	if p, _ := s.find("p"); p.State != control.FoundNotExported || p.Here {
		t.Errorf("closed: %+v", p)
	}
	copyFile(t, s.path("p1"), s.path("old1"))
	copyFile(t, s.path("p0"), s.path("old0"))
	s.use((*pool.Pool).Export, "p0", "p1")
	// Which of two is the right one only a person can tell, even if one is older.
	if p, notes := s.find("p"); p.State != control.FoundIncomplete || !strings.Contains(notes, "both are device") || len(p.Missing) != 0 {
		t.Errorf("two of each: %+v, %s", p, notes)
	}
	os.Remove(s.path("old0"))
	os.Remove(s.path("old1"))
	p, _ = s.find("p")
	if p.State != control.FoundExported || p.Epoch != 3 || p.Devices[1].Number != 2 || p.Devices[1].Copies[0].Path != s.path("p1") || p.Devices[1].Size != 64<<20 {
		t.Errorf("exported: %+v", p)
	}
	if v, err := FoundVolumes(p); err != nil || strings.Join(v, " ") != "v-1 v-2 v-3" {
		t.Errorf("volumes %q, %v", v, err)
	}
	// A device by several names is one.
	if err := os.Symlink(s.path("p0"), s.path("link")); err != nil {
		t.Fatal(err)
	}
	if p, notes := s.find("p"); p.State != control.FoundExported {
		t.Errorf("with a link: %+v, %s", p, notes)
	}
	devs := s.open("p1")
	if p, _ := s.find("p"); p.State != control.FoundInUse || p.Devices[0].Copies[0].InUse || !p.Devices[1].Copies[0].InUse {
		t.Errorf("locked: %+v", p)
	}
	closeAll(devs)
	if p, _ := s.find("p", s.path("p0")); p.State != control.FoundIncomplete || len(p.Missing) != 1 || p.Missing[0] != 2 {
		t.Errorf("the first alone: %+v", p)
	}
	if p, _ := s.find("p", s.path("p1")); p.State != control.FoundIncomplete || p.Wants != 0 || p.Missing[0] != 1 {
		t.Errorf("the second alone: %+v", p)
	}
	if _, err := FindPools([]string{s.path("nowhere")}, ""); control.KindOf(err) == "" || err == nil {
		t.Errorf("%v", err)
	}
	if _, notes := s.find("p", s.dir); notes != "" {
		t.Errorf("of what is empty or too small: %s", notes)
	}
	if found, err := FindPools(nil, s.dir); err != nil || !slices.ContainsFunc(found.Pools, func(q control.FoundPool) bool { return q.ID == p.ID }) {
		t.Errorf("the directory of the pair: %+v, %v", found, err)
	}
}

// Copies of mirrors are put together, those that lack something among them; one
// that has nothing to be put together with is told of.
func TestFindMirrors(t *testing.T) {
	s := &shelf{t, t.TempDir()}
	s.make("m", true, "m0", "m1", "n0", "n1")
	s.make("lone", false, "lone")
	s.use((*pool.Pool).Export, "m0", "m1", "n0", "n1")
	p, notes := s.find("m")
	if p.State != control.FoundExported || p.Wants != 2 || len(p.Devices) != 2 || notes != "" {
		t.Fatalf("%+v, %s", p, notes)
	}
	for i, want := range [][]string{{"m0", "m1"}, {"n0", "n1"}} {
		for j, c := range p.Devices[i].Copies {
			if c.Path != s.path(want[j]) || c.State != "in sync" {
				t.Errorf("device %d copy %d: %+v", i+1, j+1, c)
			}
		}
	}
	s.use((*pool.Pool).Export, "m0", "n0", "n1") // m1 misses this
	p, notes = s.find("m")
	if p.State != control.FoundExported || p.Devices[0].Copies[1].State != "absent" || p.Devices[0].Copies[1].Path != s.path("m1") || notes != "" {
		t.Errorf("%+v, %s", p, notes)
	}
	if v, err := FoundVolumes(p); err != nil || len(v) != 2 {
		t.Errorf("%q, %v", v, err)
	}
	p, notes = s.find("m", s.path("m0"), s.path("n1"))
	if p.State != control.FoundExported || len(p.Devices[0].Copies) != 2 || p.Devices[0].Copies[1].Path != "" || !strings.Contains(notes, "a copy of device 2 is missing") {
		t.Errorf("one of each: %+v, %s", p, notes)
	}
	if v, err := FoundVolumes(p); err != nil || len(v) != 2 {
		t.Errorf("of one of each: %q, %v", v, err)
	}
	s.use((*pool.Pool).Export, "m0", "m1", "n0", "n1") // it begins to get what it misses
	if p, notes = s.find("m"); p.State != control.FoundExported || p.Devices[0].Copies[1].State != "resilvering" || notes != "" {
		t.Errorf("%+v, %s", p, notes)
	}
	if p, notes = s.find("m", s.path("m1"), s.path("n1")); p.State != control.FoundIncomplete || p.Missing[0] != 1 || !strings.Contains(notes, "no copy that has everything") {
		t.Errorf("%+v, %s", p, notes)
	}
}
