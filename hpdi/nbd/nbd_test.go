package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A driver is what passes the suite, whatever the server is able to do.
func TestConformance(t *testing.T) {
	for name, change := range map[string]func(*server){
		"structured":    func(*server) {},
		"simple":        func(s *server) { s.noStructured = true },
		"no status":     func(s *server) { s.noStatus = true },
		"by name":       func(s *server) { s.noGo, s.noStructured = true, true },
		"small":         func(s *server) { s.least, s.most = 1, 8192 },
		"large blocks":  func(s *server) { s.least, s.most = 4096, 1<<20 },
		"in pieces":     func(s *server) { s.asked = inPieces },
		"nothing extra": func(s *server) { s.flags = proto.FlagHasFlags },
	} {
		t.Run(name, func(t *testing.T) {
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				s := newServer(hpditest.MinSize)
				change(s)
				return s.open(t, Options{Connections: 3})
			})
		})
	}
}

// inPieces answers reads with several chunks, the last piece first, zeroes as holes, and the
// end apart.
func inPieces(c *serving, q asked) (bool, error) {
	if q.kind != proto.CmdRead {
		return false, nil
	}
	c.s.mu.Lock()
	data := bytes.Clone(c.s.data[q.off:][:q.n])
	c.s.mu.Unlock()
	for end := len(data); end > 0; {
		from := max(0, end-1000)
		var err error
		if bytes.Count(data[from:end], []byte{0}) == end-from {
			err = c.chunk(0, proto.ChunkOffsetHole, q, q.off+uint64(from), uint32(end-from))
		} else {
			err = c.chunk(0, proto.ChunkOffsetData, q, q.off+uint64(from), data[from:end])
		}
		if err != nil {
			return true, err
		}
		end = from
	}
	return true, c.chunk(proto.ChunkDone, proto.ChunkNone, q)
}

// program returns the path of a program that tests need.
func program(t *testing.T, name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("POLLUX_REQUIRE_CLIENTS") == "1" {
			t.Fatal(err)
		}
		t.Skipf("%v: `make deps` installs it", err)
	}
	return path
}

// serve runs a server that others have made until the test ends, and returns the URI of its
// export. The arguments come with the path of the socket in place of SOCKET.
func serve(t *testing.T, argv ...string) string {
	argv[0] = program(t, argv[0])
	socket := filepath.Join(t.TempDir(), "s")
	for i := range argv {
		argv[i] = strings.ReplaceAll(argv[i], "SOCKET", socket)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			must(t, c.Close())
			return "nbd+unix:///?socket=" + socket
		}
		if ctx.Err() != nil {
			t.Fatalf("%s does not listen: %s", argv[0], out.String())
		}
		time.Sleep(time.Millisecond) // another program starts
	}
}

// Servers that others have made are devices, too.
func TestServers(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, hpditest.MinSize))
	for name, argv := range map[string][]string{
		"nbdkit":          {"nbdkit", "-f", "-U", "SOCKET", "memory", fmt.Sprint(hpditest.MinSize)},
		"nbdkit, delayed": {"nbdkit", "-f", "-U", "SOCKET", "--filter=delay", "memory", fmt.Sprint(hpditest.MinSize), "rdelay=1ms", "wdelay=1ms"},
		"nbdkit, in turn": {"nbdkit", "-f", "-U", "SOCKET", "--filter=noparallel", "memory", fmt.Sprint(hpditest.MinSize)},
		"qemu-nbd":        {"qemu-nbd", "-k", "SOCKET", "-f", "raw", "-t", "-e", "8", "--discard=unmap", image},
	} {
		t.Run(name, func(t *testing.T) {
			uri := serve(t, argv...)
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := Open(t.Context(), uri, Options{Connections: 4})
				must(t, err)
				return d
			})
		})
	}
}

// What a server refuses is the error of the request alone.
func TestRefused(t *testing.T) {
	uri := serve(t, "nbdkit", "-f", "-U", "SOCKET", "--filter=error", "memory", fmt.Sprint(hpditest.MinSize), "error-pread=ENOSPC", "error-pread-rate=50%")
	d, err := Open(t.Context(), uri, Options{})
	must(t, err)
	q, err := d.NewQueue(8)
	must(t, err)
	bad := 0
	for range 200 {
		r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, 4096)}}
		must(t, q.Submit(r))
		_, err := q.Wait(1, nil)
		must(t, err)
		if r.Err != nil {
			bad++
			if !errors.Is(r.Err, syscall.ENOSPC) || !strings.Contains(r.Err.Error(), uri) {
				t.Fatal(r.Err)
			}
		}
	}
	if bad < 50 || bad > 150 {
		t.Errorf("%d of 200 reads failed", bad)
	}
	must(t, q.Close())
	must(t, d.Close())
}

// recorder is a connection that notes where what is written comes from.
type recorder struct {
	net.Conn
	wrote []*byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.wrote = append(r.wrote, unsafe.SliceData(p))
	return r.Conn.Write(p)
}

// What the application passes is what the kernel gets, and where the kernel puts what comes.
func TestZeroCopy(t *testing.T) {
	s := newServer(1 << 20)
	for i := range s.data {
		s.data[i] = byte(i >> 12)
	}
	for _, simple := range []bool{false, true} {
		s.noStructured = simple
		d := s.open(t, Options{})
		defer func() { must(t, d.Close()) }()
		// A second reader of the same connection, whose reads are noted.
		conn, exp, err := d.dial(t.Context())
		must(t, err)
		l := &link{d: d, conn: conn, number: 1, flying: map[uint64]*command{}}
		src := newSource(l, conn, exp)
		var into []*byte
		scatter := src.scatter
		src.scatter = func(fd uintptr) bool {
			ok := scatter(fd)
			for n, i := src.got, 0; ok && n > 0; i++ {
				into = append(into, unsafe.SliceData(src.vec[i]))
				n -= len(src.vec[i])
			}
			return ok
		}
		ended := make(chan struct{})
		go func() {
			_ = src.replies()
			close(ended)
		}()
		q := &queue{d: d, l: l}
		q.cond.L = &q.mu
		d.queues++
		mem := make([]byte, 8*4096)
		vec := [][]byte{mem[4096 : 3*4096], mem[4*4096 : 5*4096]}
		must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 8192, Vec: vec}))
		for i, v := range vec {
			if !bytes.Equal(v, s.data[8192+2*i*4096:][:len(v)]) {
				t.Fatal("it has read something else")
			}
		}
		rec := &recorder{Conn: conn}
		l.conn = rec
		must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: 8192, Vec: vec}))
		if len(rec.wrote) != 3 || rec.wrote[1] != &vec[0][0] || rec.wrote[2] != &vec[1][0] {
			t.Errorf("%d pieces were written, not a header and the vectors", len(rec.wrote))
		}
		must(t, q.Close())
		must(t, conn.Close())
		<-ended
		// However the kernel cuts it, all of it lies in the vectors, and only headers elsewhere.
		inside := 0
		for _, p := range into {
			if a := uintptr(unsafe.Pointer(p)) - uintptr(unsafe.Pointer(&mem[0])); a < uintptr(len(mem)) {
				inside++
			} else if p != &src.head[0] && (uintptr(unsafe.Pointer(p)) < uintptr(unsafe.Pointer(&src.head)) || uintptr(unsafe.Pointer(p)) >= uintptr(unsafe.Pointer(&src.head))+unsafe.Sizeof(src.head)) {
				t.Error("something was read to where neither vectors nor headers are")
			}
		}
		if inside < 2 {
			t.Errorf("%d pieces were read into the vectors", inside)
		}
	}
}

// A request costs no allocation.
func TestAllocations(t *testing.T) {
	s := newServer(1 << 20)
	d := s.open(t, Options{})
	opened, err := d.NewQueue(8)
	must(t, err)
	q := opened.(*queue)
	mem := make([]byte, 8192)
	reqs := []*hpdi.Request{
		{Op: hpdi.OpRead, Vec: [][]byte{mem[:4096]}}, {Op: hpdi.OpWrite, Offset: 8192, Vec: [][]byte{mem[:4096], mem[4096:]}}, {Op: hpdi.OpFlush},
	}
	done := make([]*hpdi.Request, 0, 8)
	l := d.links[0]
	got := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			must(b, q.Submit(reqs...))
			if done, err = q.Wait(3, done[:0]); err != nil || len(done) != 3 {
				b.Fatal(len(done), err)
			}
		}
	})
	// The server in this process allocates for each: reading and writing of a header and its
	// fields. What the client does alone is counted without it.
	t.Logf("%d allocations for 3 requests, the test's server included", got.AllocsPerOp())
	n := testing.AllocsPerRun(100, func() {
		q.mu.Lock()
		q.batch = q.batch[:0]
		for _, r := range reqs {
			q.flying++
			q.cutLocked(r)
		}
		q.mu.Unlock()
		l.mu.Lock()
		for _, c := range q.batch {
			l.order++
			c.order, c.cookie = l.order, l.order
			l.flying[c.cookie] = c
			c.sent = l.number
		}
		l.mu.Unlock()
		for _, c := range q.batch {
			if f, err := l.find(c.cookie); f != c || err != nil {
				t.Fatal(err)
			}
			l.finish(c)
		}
		done, err = q.Wait(3, done[:0])
		must(t, err)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	must(t, q.Close())
	must(t, d.Close())
}

// A URI says all that it takes to find an export.
func TestURI(t *testing.T) {
	for uri, want := range map[string]target{
		"nbd://host/disk":                       {network: "tcp", address: "host:10809", host: "host", export: "disk"},
		"nbd://[::1]:77/":                       {network: "tcp", address: "[::1]:77", host: "::1"},
		"nbds://host:1/a%20b":                   {network: "tcp", address: "host:1", host: "host", export: "a b", tls: true},
		"nbd+unix:///x/y?socket=/run/s":         {network: "unix", address: "/run/s", export: "x/y"},
		"nbds+unix:///?socket=/run/s&other=thi": {network: "unix", address: "/run/s", tls: true},
	} {
		if got, err := parse(uri); err != nil || got != want {
			t.Errorf("%s: %+v, %v", uri, got, err)
		}
	}
	for _, uri := range []string{"http://host/", "nbd+unix:///x", "nbd://host:port/", "nbd://host/x?socket=/run/s", "nbd://host/x?tls-hostname=a", "nbd+unix:///?socket=/run/s&tls-certificates=/etc", "nbd://h/" + strings.Repeat("x", maxName+1), "disk"} {
		if got, err := parse(uri); err == nil {
			t.Errorf("%.40s: %+v", uri, got)
		}
	}
}
