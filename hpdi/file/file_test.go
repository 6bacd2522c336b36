package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

const testSize = 16 << 20

// engines are those that work here.
func engines(t testing.TB) []Engine {
	if _, err := probeURing(false); err != nil {
		t.Logf("io_uring is not tested: %v", err)
		return []Engine{EngineSync}
	}
	return []Engine{EngineURing, EngineSync}
}

// create makes a backing file in dir.
func create(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk")
	if err := Create(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// open opens path and closes it when the test ends.
func open(t testing.TB, path string, opts Options) hpdi.Device {
	t.Helper()
	d, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func newQueue(t testing.TB, d hpdi.Device, depth int) hpdi.Queue {
	t.Helper()
	q, err := d.NewQueue(depth)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func closeQueue(t testing.TB, q hpdi.Queue) {
	t.Helper()
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

func alloc(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := hpdi.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hpdi.Free(mem); err != nil {
			t.Error(err)
		}
	})
	return mem
}

func TestConformance(t *testing.T) {
	for _, engine := range engines(t) {
		for _, direct := range []Direct{DirectAuto, DirectOff} {
			t.Run(fmt.Sprintf("%s/direct-%s", engine, direct), func(t *testing.T) {
				hpditest.Run(t, func(t *testing.T) hpdi.Device {
					d, err := Open(create(t, t.TempDir(), testSize), Options{Engine: engine, Direct: direct, Lock: true})
					if err != nil {
						t.Fatal(err)
					}
					return d
				})
			})
		}
		t.Run(string(engine)+"/memory", func(t *testing.T) {
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := Open(create(t, memoryDir(t), testSize), Options{Engine: engine, Block: true, Poll: 50 * time.Microsecond})
				if err != nil {
					t.Fatal(err)
				}
				return d
			})
		})
	}
}

// memoryDir returns a folder on a tmpfs, which has no direct I/O to speak of
// and no FALLOC_FL_ZERO_RANGE.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hpdi-file-test-")
	if err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestInfoSaysWhatWasChosen(t *testing.T) {
	path := create(t, memoryDir(t), testSize)
	d := open(t, path, Options{Engine: EngineSync})
	info := d.Info()
	if info.Driver != "sync" || info.Direct || !strings.Contains(info.Note, "no direct I/O: the file lives in memory") {
		t.Errorf("info %+v does not say that a file in memory has no direct I/O", info)
	}
	if info.Size != testSize || info.BlockSize != BlockSize || info.Name != path {
		t.Errorf("info %+v, want size %d", info, testSize)
	}
	if _, err := Open(path, Options{Direct: DirectOn}); err == nil {
		t.Error("direct I/O was demanded and given on tmpfs")
	}
	d = open(t, path, Options{Direct: DirectOff})
	if info := d.Info(); info.Driver == "io_uring" && info.Note != "" {
		t.Errorf("note %q though nothing was missed", info.Note)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	path := create(t, dir, testSize)
	small := filepath.Join(dir, "small")
	if err := os.WriteFile(small, make([]byte, BlockSize-1), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		path string
		opts Options
		want string
	}{
		{filepath.Join(dir, "missing"), Options{}, "no such file"},
		{dir, Options{}, "neither a regular file nor a block device"},
		{pipe, Options{}, "neither a regular file nor a block device"},
		{"/dev/null", Options{}, "neither a regular file nor a block device"},
		{small, Options{}, "at least 4096 are needed"},
		{path, Options{Direct: "maybe"}, "must be auto, on or off"},
		{path, Options{Engine: "aio"}, "must be auto, io_uring or sync"},
	}
	for _, tt := range tests {
		d, err := Open(tt.path, tt.opts)
		if errors.Is(err, ErrTooSmall) != (tt.path == small) {
			t.Errorf("%s: %v", tt.path, err)
		}
		if err == nil {
			t.Errorf("%s with %+v was opened: %+v", tt.path, tt.opts, d.Info())
		} else if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s with %+v: error %q, want it to say %q", tt.path, tt.opts, err, tt.want)
		}
	}
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := create(t, dir, testSize)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o600 || st.Size() != testSize {
		t.Errorf("created with mode %v and %d bytes", st.Mode(), st.Size())
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > testSize/16 {
		t.Errorf("a fresh file takes %d bytes of %d", used, testSize)
	}
	if err := Create(path, testSize); !errors.Is(err, os.ErrExist) {
		t.Errorf("create over a file: %v", err)
	}
	for _, size := range []int64{0, -BlockSize, BlockSize + 1} {
		if err := Create(filepath.Join(dir, "odd"), size); err == nil {
			t.Errorf("a file of %d bytes was created", size)
		}
	}
}

func TestSizeIsRoundedDown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd")
	if err := os.WriteFile(path, make([]byte, 5*BlockSize+700), 0o600); err != nil {
		t.Fatal(err)
	}
	d := open(t, path, Options{})
	if got := d.Info().Size; got != 5*BlockSize {
		t.Errorf("size %d, want %d", got, 5*BlockSize)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 5*BlockSize+700 {
		t.Errorf("opening changed the file: %v, %v", st, err)
	}
}

func TestReadOnly(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{ReadOnly: true, Engine: engine, Lock: true})
			if info := d.Info(); !info.ReadOnly || info.Discard || info.Zeroes {
				t.Errorf("info of a read-only device: %+v", info)
			}
			q := newQueue(t, d, 4)
			defer closeQueue(t, q)
			p := alloc(t, BlockSize)
			for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpDiscard, hpdi.OpWriteZeroes} {
				if err := hpdi.Do(q, &hpdi.Request{Op: op, Vec: [][]byte{p}, Length: BlockSize}); !errors.Is(err, hpdi.ErrReadOnly) {
					t.Errorf("%s: %v, want %v", op, err, hpdi.ErrReadOnly)
				}
			}
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p}}, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestContentsSurviveReopening(t *testing.T) {
	path := create(t, t.TempDir(), testSize)
	p := alloc(t, 8*BlockSize)
	for round := range 2 {
		for _, engine := range engines(t) {
			d, err := Open(path, Options{Engine: engine, Lock: true})
			if err != nil {
				t.Fatal(err)
			}
			q := newQueue(t, d, 4)
			if round > 0 {
				clear(p)
				if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: BlockSize, Vec: [][]byte{p}}); err != nil {
					t.Fatal(err)
				}
				if got := string(p[:8]); got != "contents" {
					t.Errorf("%s: reads %q after reopening", engine, got)
				}
			} else {
				copy(p, "contents")
				w := &hpdi.Request{Op: hpdi.OpWrite, Offset: BlockSize, Vec: [][]byte{p}}
				if err := hpdi.Do(q, w); err != nil {
					t.Fatal(err)
				}
				if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
					t.Fatal(err)
				}
			}
			closeQueue(t, q)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestShortenedFile: a file that shrinks under the device gives an error, not
// old memory, for what is gone, and serves the rest.
func TestShortenedFile(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			path := create(t, t.TempDir(), testSize)
			d := open(t, path, Options{Engine: engine})
			if err := os.Truncate(path, testSize/2); err != nil {
				t.Fatal(err)
			}
			q := newQueue(t, d, 4)
			defer closeQueue(t, q)
			p := alloc(t, 4*BlockSize)
			for _, off := range []int64{testSize / 2, testSize/2 - BlockSize} { // all of it gone; a part
				err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}})
				if !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), path) {
					t.Errorf("read at %d: %v", off, err)
				}
			}
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p}}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNoAllocations(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine})
			q := newQueue(t, d, 8)
			defer closeQueue(t, q)
			mem := alloc(t, 64*BlockSize)
			var reqs []*hpdi.Request
			for i := range 8 {
				r := &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(i * 8 * BlockSize)}
				for v := range 8 { // every other block, so that vectors stay apart
					r.Vec = append(r.Vec, mem[(i+8*(v^1))*BlockSize:][:BlockSize])
				}
				reqs = append(reqs, r)
			}
			done := make([]*hpdi.Request, 0, len(reqs))
			allocs := testing.AllocsPerRun(100, func() {
				if err := q.Submit(reqs...); err != nil {
					t.Fatal(err)
				}
				var err error
				if done, err = q.Wait(len(reqs), done[:0]); err != nil || len(done) != len(reqs) {
					t.Fatal(err, len(done))
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations for %d requests", allocs, len(reqs))
			}
		})
	}
}

func TestFillIovecs(t *testing.T) {
	mem := alloc(t, 8*BlockSize)
	b := func(i, n int) []byte { return mem[i*BlockSize : (i+n)*BlockSize] }
	base := func(v []byte) uintptr { return uintptr(unsafe.Pointer(&v[0])) }
	vec := [][]byte{b(0, 1), b(1, 1), nil, b(4, 2), b(3, 1), b(7, 1)}
	tests := []struct {
		room int
		skip int64
		want []iovec
	}{
		{8, 0, []iovec{{base(b(0, 1)), 8192}, {base(b(4, 1)), 8192}, {base(b(3, 1)), 4096}, {base(b(7, 1)), 4096}}},
		{2, 0, []iovec{{base(b(0, 1)), 8192}, {base(b(4, 1)), 8192}}},
		{8, 512, []iovec{{base(b(0, 1)) + 512, 8192 - 512}, {base(b(4, 1)), 8192}, {base(b(3, 1)), 4096}, {base(b(7, 1)), 4096}}},
		{8, 4096, []iovec{{base(b(1, 1)), 4096}, {base(b(4, 1)), 8192}, {base(b(3, 1)), 4096}, {base(b(7, 1)), 4096}}},
		{1, 5*4096 + 1024, []iovec{{base(b(7, 1)) + 1024, 3072}}},
		{1, 6 * 4096, nil},
	}
	for _, tt := range tests {
		iov := make([]iovec, tt.room)
		got := iov[:fillIovecs(iov, vec, tt.skip)]
		if fmt.Sprint(got) != fmt.Sprint(tt.want) && len(got)+len(tt.want) > 0 {
			t.Errorf("room %d, skip %d: %x, want %x", tt.room, tt.skip, got, tt.want)
		}
	}
}
