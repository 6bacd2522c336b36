package restart

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

var update = flag.Bool("update", false, "write the golden files")

func testRecord() *Record {
	file := func(n uint64) File {
		return File{Device: 65024, Inode: 100 + n, Born: 1_700_000_000_000_000_000 + n, Size: 64 << 20,
			Driver: "io_uring", BlockSize: 4096, Direct: true, Discard: true, Zeroes: true, Durable: true}
	}
	disk := File{Block: true, Device: 2064, Born: 17, Size: 1 << 30, Driver: "sync", BlockSize: 4096, Durable: true, Rotates: true, Note: "no io_uring: refused"}
	return &Record{
		Number: 5, Pool: block.PoolID{1, 2, 3}, Epoch: 4, Written: time.Unix(1_700_000_000, 5).UTC(),
		Program: "65024:77:1700000000", BootID: "b00d1d00-0000-4000-8000-000000000001", Identity: "a", Settings: `{"guest":{"port":10809},"memory":1}`,
		Name: "pool-a", IndexBytes: 32 << 20, Threshold: 3, Superblocks: []uint64{1, 129, 2, 130}, Generation: 12,
		Region: "3e610000-0000-4000-8000-000000000002", Sections: []Section{{1, 16384, 1 << 28}, {2, 1<<28 + 16384, 1 << 21}},
		Devices: []Device{
			{Index: 0, ID: block.DeviceID{9}, Blocks: 16384, First: 2048, Label: []byte("label of the first"), Copies: []Copy{{"/pool/a0", file(0)}, {"/pool/a1", file(1)}}},
			{Index: 2, ID: block.DeviceID{8}, State: 1, Class: 1, Blocks: 1 << 18, First: 256, Label: []byte("label of another"), Copies: []Copy{{"/dev/sdb", disk}}},
		},
		Volumes: []Volume{{ID: 1, Size: 1 << 30, Name: "v1"}, {ID: 7, Size: 4096, Run: 8, ReadOnly: true, Name: "images"}},
	}
}

func encode(t testing.TB, r *Record) []byte {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGolden(t *testing.T) {
	b := encode(t, testRecord())
	dump := []byte(hex.Dump(b))
	if *update {
		if err := os.WriteFile("testdata/record.hex", dump, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/record.hex")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dump, want) {
		t.Errorf("the format has changed:\n%s", dump)
	}
	if r, err := Decode(b); err != nil || !reflect.DeepEqual(r, testRecord()) {
		t.Errorf("%v\n%+v\n%+v", err, r, testRecord())
	}
}

// A record of which any byte is another one is none, whatever that byte is of.
func TestEveryByte(t *testing.T) {
	b := encode(t, testRecord())
	for i := range b {
		for _, bit := range []byte{1, 0x80, 0xff} {
			bad := bytes.Clone(b)
			bad[i] ^= bit
			if _, err := Decode(bad); err == nil {
				t.Fatalf("byte %d changed by %#x: it counts", i, bit)
			}
		}
	}
	for n := range b {
		if _, err := Decode(b[:n]); err == nil {
			t.Fatalf("cut to %d bytes it counts", n)
		}
	}
}

// What no program writes is refused, although its checksum is right.
func TestImpossible(t *testing.T) {
	for what, change := range map[string]func(*Record){
		"no device":               func(r *Record) { r.Devices = nil },
		"many devices":            func(r *Record) { r.Devices = make([]Device, 65) },
		"a device twice":          func(r *Record) { r.Devices[1].Index = 0 },
		"device 64":               func(r *Record) { r.Devices[1].Index = 64 },
		"no copy":                 func(r *Record) { r.Devices[0].Copies = nil },
		"many copies":             func(r *Record) { r.Devices[0].Copies = slices.Repeat(r.Devices[0].Copies, 9) },
		"no path":                 func(r *Record) { r.Devices[0].Copies[0].Path = "" },
		"a path too long":         func(r *Record) { r.Devices[0].Copies[0].Path = strings.Repeat("x", 1<<16) },
		"a name too long":         func(r *Record) { r.Volumes[0].Name = strings.Repeat("x", 1<<16) },
		"no size":                 func(r *Record) { r.Devices[0].Copies[0].File.Size = 0 },
		"no block size":           func(r *Record) { r.Devices[0].Copies[0].File.BlockSize = 0 },
		"a volume without a name": func(r *Record) { r.Volumes[0].Name = "" },
		"a volume without a size": func(r *Record) { r.Volumes[0].Size = 0 },
		"a section of nothing":    func(r *Record) { r.Sections[0].Length = 0 },
		"a section before all":    func(r *Record) { r.Sections[0].Offset = -1 },
		"too much":                func(r *Record) { r.Settings = strings.Repeat("x", MaxBytes) },
	} {
		r := testRecord()
		if change(r); func() error { _, err := r.Encode(); return err }() == nil {
			t.Errorf("%s: it is encoded", what)
		}
	}
}

func TestVersions(t *testing.T) {
	b := encode(t, testRecord())
	seal := func(kind ondisk.Kind, version uint16) {
		ondisk.Seal(b, ondisk.Header{Kind: kind, Version: version, Length: len(b), Generation: 5})
	}
	seal(ondisk.KindRestart, recordVersion+1)
	if _, err := Decode(b); !errors.Is(err, ondisk.ErrVersion) {
		t.Errorf("of a later version: %v", err)
	}
	seal(ondisk.KindRestart, 0)
	if _, err := Decode(b); !errors.Is(err, ondisk.ErrVersion) {
		t.Errorf("of no version: %v", err)
	}
	seal(ondisk.KindScan, recordVersion)
	if _, err := Decode(b); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("of another kind: %v", err)
	}
	longer := append(encode(t, testRecord()), make([]byte, 8)...)
	ondisk.Seal(longer, ondisk.Header{Kind: ondisk.KindRestart, Version: recordVersion, Length: len(longer)})
	if _, err := Decode(longer); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("with something behind: %v", err)
	}
}

func now(r *Record) Now {
	n := Now{Pool: r.Pool, Program: r.Program, BootID: r.BootID, Identity: r.Identity, Settings: r.Settings}
	for _, d := range r.Devices {
		for _, c := range d.Copies {
			n.Paths = append(n.Paths, c.Path)
		}
	}
	return n
}

func TestDiffers(t *testing.T) {
	for _, tt := range []struct {
		what   string
		change func(*Now)
		want   string
	}{
		{"nothing", func(*Now) {}, ""},
		{"no pool known", func(n *Now) { n.Pool = block.PoolID{} }, ""},
		{"the order of devices", func(n *Now) { slices.Reverse(n.Paths) }, ""},
		{"pool", func(n *Now) { n.Pool[0]++ }, "of pool"},
		{"program", func(n *Now) { n.Program = "another" }, "another program"},
		{"boot", func(n *Now) { n.BootID = "" }, "booted"},
		{"identity", func(n *Now) { n.Identity = "b" }, "of identity a"},
		{"port", func(n *Now) { n.Settings = `{"guest":{"port":1},"memory":1}` }, "settings have changed: guest"},
		{"two settings", func(n *Now) { n.Settings = `{"guest":1,"cache":1,"memory":1}` }, "settings have changed: cache, guest"},
		{"no settings", func(n *Now) { n.Settings = "" }, "settings have changed: all"},
		{"device added", func(n *Now) { n.Paths = append(n.Paths, "/dev/sdc") }, "has no device /dev/sdc"},
		{"device removed", func(n *Now) { n.Paths = n.Paths[:2] }, "/dev/sdb of the record is not in"},
	} {
		n := now(testRecord())
		tt.change(&n)
		if got := testRecord().Differs(n); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", tt.what, got)
		}
	}
}

func TestReplaced(t *testing.T) {
	edit := func(change func(*File)) func(map[string]File) {
		return func(m map[string]File) {
			f := m["/pool/a1"]
			change(&f)
			m["/pool/a1"] = f
		}
	}
	for _, tt := range []struct {
		what   string
		change func(map[string]File)
		want   string
	}{
		{"nothing", func(map[string]File) {}, ""},
		{"what it can do", edit(func(f *File) { f.Direct = false }), ""},
		{"missing", func(m map[string]File) { delete(m, "/dev/sdb") }, "/dev/sdb is missing"},
		{"grown", edit(func(f *File) { f.Size++ }), "/pool/a1 has 67108865 bytes and had 67108864"},
		{"another inode", edit(func(f *File) { f.Inode++ }), "/pool/a1 is another"},
		{"another file system", edit(func(f *File) { f.Device++ }), "/pool/a1 is another"},
		{"made at another time", edit(func(f *File) { f.Born++ }), "/pool/a1 is another"},
		{"a disk now", edit(func(f *File) { f.Block = true }), "/pool/a1 is another"},
		{"nobody knows", edit(func(f *File) { f.Born = 0 }), "/pool/a1 is another"},
	} {
		files := testRecord().Files()
		tt.change(files)
		if got := testRecord().Replaced(files); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", tt.what, got)
		}
	}
	r := testRecord()
	r.Devices[0].Copies[0].File.Born = 0
	if r.Replaced(r.Files()) == "" {
		t.Error("a file that nobody can tell from another counts as the same")
	}
}

func TestSame(t *testing.T) {
	a, b := testRecord(), testRecord()
	b.Number, b.Epoch, b.Generation, b.Written = 9, 9, 99, time.Time{}.Add(time.Hour)
	if !a.Same(b) || a.Same(nil) {
		t.Error("who wrote it, and when, counts")
	}
	for i, change := range []func(*Record){
		func(r *Record) { r.Volumes[1].Size += 4096 }, func(r *Record) { r.Volumes = r.Volumes[:1] },
		func(r *Record) { r.Devices[1].State = 0 }, func(r *Record) { r.Devices[0].Copies[1].File.Born++ },
		func(r *Record) { r.Settings += " " }, func(r *Record) { r.Sections[1].Length *= 2 }, func(r *Record) { r.Region = "" },
	} {
		b := testRecord()
		if change(b); a.Same(b) {
			t.Errorf("change %d is none", i)
		}
	}
	b.Devices = nil
	if a.Same(b) || b.Same(b) {
		t.Error("a record that cannot be stored is the same as something")
	}
}

func TestSlots(t *testing.T) {
	mem := make([]byte, 8<<10)
	newest := func() (*Record, error) {
		return Newest(int64(len(mem)), func(p []byte, off int64) int { return copy(p, mem[off:]) })
	}
	if _, err := newest(); !errors.Is(err, ErrNone) {
		t.Errorf("in memory of zeroes: %v", err)
	}
	s := OpenSlots(mem)
	for n := uint64(1); n <= 5; n++ {
		r := testRecord()
		r.Number = n
		if err := s.Put(encode(t, r)); err != nil {
			t.Fatal(err)
		}
		if got, err := newest(); err != nil || got.Number != n {
			t.Fatalf("%d: %+v, %v", n, got, err)
		}
		if n == 3 {
			s = OpenSlots(mem) // the next owner
		}
	}
	// Whoever dies while it replaces a record leaves the other, wherever that is.
	r := testRecord()
	r.Number, r.Volumes[1].Name = 6, "another"
	enc := encode(t, r)
	before := bytes.Clone(mem)
	for n := range len(enc) {
		copy(mem, before)
		if err := OpenSlots(mem).Put(enc[:n:n]); err != nil {
			t.Fatal(err)
		}
		got, err := newest()
		if err != nil || got.Number != 5 {
			t.Fatalf("after %d of %d bytes: %+v, %v", n, len(enc), got, err)
		}
	}
	if err := s.Put(make([]byte, 4<<10+1)); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("a record that is too long: %v", err)
	}
}

func TestNewer(t *testing.T) {
	old, new := &Record{Number: 1}, &Record{Number: 2}
	bad := fmt.Errorf("bad: %w", ondisk.ErrChecksum)
	for i, tt := range []struct {
		a, b       *Record
		errA, errB error
		want       *Record
		wantErr    error
	}{
		{old, new, nil, nil, new, nil},
		{new, old, nil, nil, new, nil},
		{nil, old, bad, nil, old, nil},
		{old, nil, nil, bad, old, nil},
		{nil, nil, ErrNone, bad, nil, bad},
		{nil, nil, bad, ErrNone, nil, bad},
		{nil, nil, ErrNone, ErrNone, nil, ErrNone},
	} {
		if got, err := Newer(tt.a, tt.errA, tt.b, tt.errB); got != tt.want || !errors.Is(err, tt.wantErr) {
			t.Errorf("%d: %+v, %v", i, got, err)
		}
	}
}

func TestFile(t *testing.T) {
	path := Path(t.TempDir(), "a")
	if _, err := Read(path); !errors.Is(err, ErrNone) {
		t.Errorf("where there is none: %v", err)
	}
	for n := range uint64(2) {
		r := testRecord()
		r.Number = n
		if err := Write(path, encode(t, r)); err != nil {
			t.Fatal(err)
		}
		if got, err := Read(path); err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("there are %v", left)
	}
	for what, b := range map[string][]byte{"nothing": {}, "half": encode(t, testRecord())[:300], "too much": make([]byte, MaxBytes+1)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := Read(path); err == nil {
			t.Errorf("a file with %s is %+v", what, r)
		}
	}
	if err := errors.Join(Remove(path), Remove(path)); err != nil {
		t.Error(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(path); err == nil {
		t.Error("a folder is a record")
	}
	if err := Write(path, nil); err == nil {
		t.Error("a folder was replaced")
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("there are %v", left)
	}
	if err := Write(filepath.Join(path, "x", "y"), nil); err != nil {
		t.Error(err)
	}
	if err := Remove(path); err == nil {
		t.Error("a folder with something in it is removed")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(f, testRecord()), true)
	small := testRecord()
	small.Devices, small.Volumes, small.Sections = small.Devices[:1], nil, nil
	f.Add(encode(f, small), true)
	f.Add([]byte("PLXrestr"), false)
	f.Fuzz(func(t *testing.T, in []byte, sound bool) {
		b := bytes.Clone(in)
		if sound && len(b) >= ondisk.HeaderSize {
			ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindRestart, Version: recordVersion, Length: len(b), Generation: 3})
		}
		r, err := Decode(b)
		if err != nil {
			return
		}
		again, err := Decode(encode(t, r))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("%v:\n%+v became\n%+v", err, r, again)
		}
		if why := r.Differs(now(r)); why != "" {
			t.Fatalf("it differs from itself: %s", why)
		}
	})
}

func FuzzNewest(f *testing.F) {
	enc := encode(f, testRecord())
	f.Add(append(append(bytes.Clone(enc), make([]byte, 64)...), enc...), uint16(10), byte(1))
	f.Add([]byte{}, uint16(0), byte(0))
	f.Fuzz(func(t *testing.T, mem []byte, at uint16, bits byte) {
		if len(mem) > 0 {
			mem = bytes.Clone(mem)
			mem[int(at)%len(mem)] ^= bits
		}
		r, err := Newest(int64(len(mem)), func(p []byte, off int64) int { return copy(p, mem[min(off, int64(len(mem))):]) })
		if (r == nil) == (err == nil) {
			t.Fatalf("%+v, %v", r, err)
		}
		s := OpenSlots(mem)
		if err := s.Put(enc); err != nil {
			return
		}
		if r, err := Newest(int64(len(mem)), func(p []byte, off int64) int { return copy(p, mem[off:]) }); err != nil {
			t.Fatalf("what was put is not there: %+v, %v", r, err)
		}
	})
}
