package vhostuser

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

const volumeBytes = 64 << 20

// disk is the features of a driver that can do everything.
var disk = virtio.Set(virtio.BlkFlush, virtio.BlkConfigWCE, virtio.BlkDiscard, virtio.BlkWriteZeroes, virtio.BlkMultiQueue)

func newServer(t testing.TB, o Options) (*Server, *nbdtest.Volume) {
	t.Helper()
	v := nbdtest.New("vol", volumeBytes)
	if o.Volume == nil {
		o.Volume = v
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	}
	s, err := New(o)
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if n := v.Staged(); n != 0 {
			t.Errorf("%d writes are staged and neither committed nor aborted", n)
		}
		if st := s.Stats(); st.Clients != 0 || st.Queues != 0 || st.InFlight != 0 {
			t.Errorf("when all is over: %+v", st)
		}
	})
	return s, v
}

// testWriter logs for a test that may have ended.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	defer func() { _ = recover() }()
	w.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// Requests of every kind, in every layout of queues.
func TestRequests(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		s, v := newServer(t, Options{Serial: "serial-1"})
		m := newMachine(t, s, setup{features: f | disk, queues: 2})
		m.start()
		for i, q := range m.vqs {
			a := buffer{dataStart, 8192}
			b := buffer{dataStart + 3*8192, 4096}
			pattern(m.data(a), 1+uint32(i))
			pattern(m.data(b), 10+uint32(i))
			sector := uint64(i * 1000)
			if code := q.do(virtio.BlkOut, sector, false, a, b); code != virtio.BlkOK {
				t.Fatalf("write: status %d", code)
			}
			want := append(patterned(8192, 1+uint32(i)), patterned(4096, 10+uint32(i))...)
			if got := v.Bytes(int64(sector)*512, 12288); !bytes.Equal(got, want) {
				t.Fatal("the volume has something else than was written")
			}
			clear(m.data(a))
			clear(m.data(b))
			if code := q.do(virtio.BlkIn, sector, true, b, a); code != virtio.BlkOK {
				t.Fatalf("read: status %d", code)
			}
			if got := append(bytes.Clone(m.data(b)), m.data(a)...); !bytes.Equal(got, want) {
				t.Fatal("something else was read than was written")
			}
			if n := v.Unstable(); n == 0 {
				t.Fatal("a write of a driver that flushes was flushed")
			}
			if code := q.do(virtio.BlkFlushCache, 0, false); code != virtio.BlkOK || v.Unstable() != 0 {
				t.Fatalf("flush: status %d, %d changes are not flushed", code, v.Unstable())
			}
			// More pieces than there are in a ring without a table, where there are tables.
			pieces := []buffer{{dataStart, 512}, {dataStart + 512, 1024}, {dataStart + 1536, 512}, {dataStart + 2048, 2048}, {dataStart + 4096, 4096}}
			if code := q.do(virtio.BlkIn, sector, true, pieces...); code != virtio.BlkOK || !bytes.Equal(m.data(a), want[:8192]) {
				t.Fatalf("a read into five pieces: status %d", code)
			}
			id := buffer{dataStart, virtio.BlkIDBytes}
			if code := q.do(virtio.BlkGetID, 0, true, id); code != virtio.BlkOK || !strings.HasPrefix(string(m.data(id)), "serial-1\x00") {
				t.Fatalf("identity: status %d, %q", code, m.data(id))
			}
			r := buffer{dataStart, virtio.BlkRangeBytes}
			virtio.BlkRange{Sector: sector, Sectors: 8}.Put(m.data(r))
			if code := q.do(virtio.BlkDiscardRange, 0, false, r); code != virtio.BlkOK || v.Calls(nbdtest.OpTrim) != i+1 {
				t.Fatalf("discard: status %d, %d calls", code, v.Calls(nbdtest.OpTrim))
			}
			virtio.BlkRange{Sector: sector + 8, Sectors: 8, Flags: virtio.BlkUnmap}.Put(m.data(r))
			if code := q.do(virtio.BlkWriteZeroRange, 0, false, r); code != virtio.BlkOK || v.Calls(nbdtest.OpZero) != i+1 {
				t.Fatalf("write of zeroes: status %d, %d calls", code, v.Calls(nbdtest.OpZero))
			}
			if got := v.Bytes(int64(sector)*512, 8192); !bytes.Equal(got, make([]byte, 8192)) {
				t.Fatal("what was discarded or written with zeroes is not zero")
			}
			if code := q.do(99, 0, false); code != virtio.BlkUnsupported {
				t.Fatalf("a request of unknown type: status %d", code)
			}
		}
		if n := s.Stats().Queues; n != 2 {
			t.Errorf("%d queues run", n)
		}
		for _, q := range m.vqs {
			q.stop()
		}
		st := s.Stats()
		if st.Writes != 2 || st.Reads != 4 || st.Flushes != 2 || st.Discards != 2 || st.WriteZeroes != 2 || st.Errors != 2 ||
			st.ReadBytes != 2*(12288+8192) || st.WrittenBytes != 2*12288 || st.Clients != 1 || st.Queues != 0 || st.InFlight != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// What a driver may not ask for ends with a status, and the queue goes on.
func TestRefused(t *testing.T) {
	s, v := newServer(t, Options{})
	m := newMachine(t, s, setup{features: disk})
	m.start()
	q := m.vqs[0]
	a := buffer{dataStart, 4096}
	r := buffer{dataStart + 8192, virtio.BlkRangeBytes}
	put := func(x virtio.BlkRange) buffer {
		x.Put(m.data(r))
		return r
	}
	for name, c := range map[string]struct {
		kind   uint32
		sector uint64
		write  bool
		data   buffer
		want   byte
	}{
		"a read past the end":         {virtio.BlkIn, volumeBytes/512 - 1, true, a, virtio.BlkIOError},
		"a write past the end":        {virtio.BlkOut, volumeBytes / 512, false, a, virtio.BlkIOError},
		"an offset that overflows":    {virtio.BlkOut, 1<<63 + 8, false, a, virtio.BlkIOError},
		"half a sector":               {virtio.BlkIn, 0, true, buffer{dataStart, 100}, virtio.BlkIOError},
		"a read of nothing":           {virtio.BlkIn, 0, true, buffer{dataStart, 0}, virtio.BlkIOError},
		"a discard past the end":      {virtio.BlkDiscardRange, 0, false, put(virtio.BlkRange{Sector: volumeBytes / 512, Sectors: 8}), virtio.BlkIOError},
		"two ranges":                  {virtio.BlkDiscardRange, 0, false, buffer{r.off, 32}, virtio.BlkUnsupported},
		"a discard of half a range":   {virtio.BlkDiscardRange, 0, false, buffer{r.off, 8}, virtio.BlkUnsupported},
		"a write with flags of reads": {virtio.BlkOut, 0, true, a, virtio.BlkIOError},
	} {
		if name == "a discard past the end" {
			put(virtio.BlkRange{Sector: volumeBytes / 512, Sectors: 8})
		}
		if code := q.do(c.kind, c.sector, c.write, c.data); code != c.want {
			t.Errorf("%s: status %d, not %d", name, code, c.want)
		}
	}
	put(virtio.BlkRange{Sector: 0, Sectors: 8, Flags: virtio.BlkUnmap})
	if code := q.do(virtio.BlkDiscardRange, 0, false, r); code != virtio.BlkUnsupported {
		t.Errorf("a discard with the flag of writes of zeroes: status %d", code)
	}
	put(virtio.BlkRange{Sector: 0, Sectors: 8, Flags: 2})
	if code := q.do(virtio.BlkWriteZeroRange, 0, false, r); code != virtio.BlkUnsupported {
		t.Errorf("a write of zeroes with an unknown flag: status %d", code)
	}
	if code := q.do(virtio.BlkIn, 0, true, a); code != virtio.BlkOK {
		t.Errorf("after all that, a read: status %d", code)
	}
	v.SetReadOnly(true)
	if code := q.do(virtio.BlkOut, 0, false, a); code != virtio.BlkOK && code != virtio.BlkIOError {
		t.Errorf("status %d", code)
	}
}

func TestReadOnly(t *testing.T) {
	s, v := newServer(t, Options{ReadOnly: true})
	if f := s.offered(); !f.Has(virtio.BlkReadOnly) || f.Has(virtio.BlkDiscard) || f.Has(virtio.BlkWriteZeroes) || f.Has(virtio.BlkConfigWCE) {
		t.Errorf("features %#x of a read-only disk", uint64(f))
	}
	m := newMachine(t, s, setup{features: virtio.Set(virtio.BlkReadOnly, virtio.BlkFlush)})
	m.start()
	a := buffer{dataStart, 4096}
	r := buffer{dataStart, virtio.BlkRangeBytes}
	virtio.BlkRange{Sectors: 8}.Put(m.data(r))
	for _, x := range []struct {
		kind  uint32
		write bool
		data  []buffer
		want  byte
	}{
		{virtio.BlkOut, false, []buffer{a}, virtio.BlkIOError},
		{virtio.BlkDiscardRange, false, []buffer{r}, virtio.BlkIOError},
		{virtio.BlkIn, true, []buffer{a}, virtio.BlkOK},
		{virtio.BlkFlushCache, false, nil, virtio.BlkOK},
	} {
		if code := m.vqs[0].do(x.kind, 0, x.write, x.data...); code != x.want {
			t.Errorf("request %d: status %d, not %d", x.kind, code, x.want)
		}
	}
	if v.Calls(nbdtest.OpTryStage)+v.Calls(nbdtest.OpTrim) != 0 {
		t.Error("a read-only disk was written to")
	}
}

// Writes are flushed one by one for a driver that cannot flush, and for one that has
// switched the write-back cache off.
func TestWritethrough(t *testing.T) {
	a := buffer{dataStart, 4096}
	s, v := newServer(t, Options{})
	m := newMachine(t, s, setup{features: 0})
	m.start()
	if code := m.vqs[0].do(virtio.BlkOut, 0, false, a); code != virtio.BlkOK || v.Unstable() != 0 {
		t.Errorf("without flushes: status %d, %d changes are not flushed", code, v.Unstable())
	}
	m = newMachine(t, s, setup{features: disk})
	m.start()
	if code := m.vqs[0].do(virtio.BlkOut, 0, false, a); code != virtio.BlkOK || v.Unstable() == 0 {
		t.Errorf("with flushes: status %d, %d changes are not flushed", code, v.Unstable())
	}
	wce := func(on byte) vhost.Config {
		return vhost.Config{Offset: virtio.BlkConfigWriteback, Size: 1, Data: []byte{on}}
	}
	must(t, m.ack(vhost.SetConfig, wce(0).Append(nil)))
	if c := m.config(); c.Writeback {
		t.Error("the cache is on after it was switched off")
	}
	if code := m.vqs[0].do(virtio.BlkOut, 8, false, a); code != virtio.BlkOK || v.Unstable() != 0 {
		t.Errorf("with the cache off: status %d, %d changes are not flushed", code, v.Unstable())
	}
	r := buffer{dataStart, virtio.BlkRangeBytes}
	virtio.BlkRange{Sectors: 8}.Put(m.data(r))
	if code := m.vqs[0].do(virtio.BlkWriteZeroRange, 0, false, r); code != virtio.BlkOK || v.Unstable() != 0 {
		t.Errorf("a write of zeroes with the cache off: status %d, %d changes are not flushed", code, v.Unstable())
	}
	must(t, m.ack(vhost.SetConfig, wce(1).Append(nil)))
	if code := m.vqs[0].do(virtio.BlkOut, 8, false, a); code != virtio.BlkOK || v.Unstable() == 0 {
		t.Errorf("with the cache on again: status %d, %d changes are not flushed", code, v.Unstable())
	}
	if err := m.ack(vhost.SetConfig, vhost.Config{Offset: 0, Size: 8, Data: make([]byte, 8)}.Append(nil)); !errors.Is(err, errRefused) {
		t.Errorf("the capacity was written to: %v", err)
	}
	if err := m.cut(); !errors.Is(err, errRule) {
		t.Errorf("and then: %v", err)
	}
}

// config reads the configuration space.
func (m *machine) config() virtio.BlkConfig {
	m.t.Helper()
	m.send(vhost.GetConfig, vhost.Config{Size: virtio.BlkConfigBytes, Data: make([]byte, virtio.BlkConfigBytes)}.Append(nil))
	var a vhost.Message
	must(m.t, m.vc.Receive(&a))
	c, err := vhost.ParseConfig(a.Payload)
	must(m.t, err)
	x, err := virtio.ReadBlkConfig(c.Data)
	must(m.t, err)
	return x
}

// The configuration space says what the volume and the limits are, and a new size reaches
// the driver.
func TestConfigAndResize(t *testing.T) {
	s, v := newServer(t, Options{Queues: 4, QueueSize: 64})
	m := newMachine(t, s, setup{features: disk})
	c := m.config()
	if c.Capacity != volumeBytes/512 || c.Queues != 4 || c.SegMax != 62 || c.BlockSize != 512 || c.PhysicalExp != 3 || c.MinIO != 8 ||
		!c.Writeback || c.DiscardSegments != 1 || c.WriteZeroesSegments != 1 || !c.WriteZeroesMayUnmap {
		t.Errorf("%+v", c)
	}
	if most := int64(c.SizeMax) * int64(c.SegMax); most > block.MaxIO || most < block.MaxIO/2 {
		t.Errorf("%d segments of %d bytes, a volume takes %d", c.SegMax, c.SizeMax, block.MaxIO)
	}
	ours, theirs := socketpair(t)
	m.back = ours
	f, err := theirs.File()
	must(t, err)
	must(t, m.ack(vhost.SetBackendReqFD, nil, int(f.Fd())))
	_, _ = f.Close(), theirs.Close()
	m.start()
	a := buffer{dataStart, 4096}
	if code := m.vqs[0].do(virtio.BlkOut, volumeBytes/512, false, a); code != virtio.BlkIOError {
		t.Errorf("a write behind the end: status %d", code)
	}
	v.Grow(2 * volumeBytes)
	if c := m.config(); c.Capacity != volumeBytes/512 {
		t.Errorf("the capacity is %d before the server takes requests for it", c.Capacity)
	}
	s.Resized()
	_ = ours.SetDeadline(time.Now().Add(5 * time.Second))
	var n vhost.Message
	must(t, vhost.NewConn(ours).Receive(&n))
	if n.Request != vhost.BackendConfigChange {
		t.Errorf("message %d instead of the notice of a change", n.Request)
	}
	if c := m.config(); c.Capacity != 2*volumeBytes/512 {
		t.Errorf("the capacity is %d after the volume grew", c.Capacity)
	}
	if code := m.vqs[0].do(virtio.BlkOut, volumeBytes/512, false, a); code != virtio.BlkOK {
		t.Errorf("a write into what was added: status %d", code)
	}
}

// A device that is slow does not stop hits of the same queue, and errors of the volume are
// errors of the request.
func TestWorkers(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	slow := make(chan struct{})
	v.Hook = func(ctx context.Context, op nbdtest.Op, off, _ int64) error {
		switch {
		case op == nbdtest.OpTryRead && off == 0, op == nbdtest.OpTryCommit && off == 1<<20:
			return nbdtest.ErrWouldWait
		case op == nbdtest.OpRead && off == 0:
			select {
			case <-slow:
			case <-ctx.Done():
				return ctx.Err()
			}
		case op == nbdtest.OpTryRead && off == 2<<20:
			return &block.CorruptError{What: "block", Where: "here", Why: "a test"}
		case op == nbdtest.OpTryStage && off == 3<<20:
			return block.ErrNoSpace
		}
		return nil
	}
	log := &logged{}
	s, _ := newServer(t, Options{Volume: v, Log: slog.New(slog.NewTextHandler(log, nil))})
	m := newMachine(t, s, setup{features: disk})
	m.start()
	q := m.vqs[0]
	a, b := buffer{dataStart, 4096}, buffer{dataStart + 4096, 4096}
	id := q.queue(virtio.BlkIn, 0, true, a)
	q.publish()
	for range 20 {
		if code := q.do(virtio.BlkIn, 8, true, b); code != virtio.BlkOK {
			t.Fatalf("a hit behind a miss: status %d", code)
		}
	}
	if code := q.do(virtio.BlkOut, 1<<20/512, false, b); code != virtio.BlkOK || v.Calls(nbdtest.OpCommit) != 1 {
		t.Errorf("a write that has to wait: status %d, %d commits", code, v.Calls(nbdtest.OpCommit))
	}
	if code := q.do(virtio.BlkIn, 2<<20/512, true, b); code != virtio.BlkIOError || !strings.Contains(log.String(), "block at here is corrupt: a test") {
		t.Errorf("a damaged block: status %d, log:\n%s", code, log)
	}
	if code := q.do(virtio.BlkOut, 3<<20/512, false, b); code != virtio.BlkIOError {
		t.Errorf("a full pool: status %d", code)
	}
	for i := 0; s.Stats().InFlight != 1; i++ { // the driver sees a completion before it is counted
		if time.Sleep(time.Millisecond); i > 5000 {
			t.Fatalf("%d requests in flight", s.Stats().InFlight)
		}
	}
	close(slow)
	if code := q.wait(id); code != virtio.BlkOK {
		t.Errorf("the miss: status %d", code)
	}
}

// A machine whose writes wait has a bounded share of the operation log.
func TestShare(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	full := make(chan struct{})
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		switch op {
		case nbdtest.OpTryCommit:
			return nbdtest.ErrWouldWait
		case nbdtest.OpCommit:
			<-full
		}
		return nil
	}
	s, _ := newServer(t, Options{Volume: v})
	m := newMachine(t, s, setup{features: disk, size: 128})
	m.start()
	q := m.vqs[0]
	const n, each = 10, 8 << 20
	var ids []int
	for range n {
		ids = append(ids, q.queue(virtio.BlkOut, 0, false, buffer{dataStart, each}))
	}
	q.publish()
	for i := 0; s.Stats().InFlight < n || v.Staged() < maxStaged/each; i++ {
		if time.Sleep(time.Millisecond); i > 5000 {
			t.Fatalf("%d requests in flight, %d staged", s.Stats().InFlight, v.Staged())
		}
	}
	time.Sleep(5 * time.Millisecond)
	if got := v.Staged(); got > maxStaged/each+1 { // one is tried, and may have to be given up
		t.Errorf("%d writes of %d bytes are staged", got, each)
	}
	close(full)
	for _, id := range ids {
		if code := q.wait(id); code != virtio.BlkOK {
			t.Errorf("status %d", code)
		}
	}
}

// Writes that wait for the operation log are not overtaken for ever by later ones, for whose
// commits no worker would be left.
func TestShareInTurn(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	commits, flushed := make(chan struct{}), make(chan struct{})
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		switch op {
		case nbdtest.OpTryCommit:
			return nbdtest.ErrWouldWait
		case nbdtest.OpCommit:
			<-commits
		case nbdtest.OpFlush:
			<-flushed
		}
		return nil
	}
	s, _ := newServer(t, Options{Volume: v, Workers: 1})
	m := newMachine(t, s, setup{features: disk, size: 128})
	m.start()
	q := m.vqs[0]
	const each, held = 8 << 20, maxStaged / (8 << 20)
	submit := func(n int) {
		for range n {
			q.queue(virtio.BlkOut, 0, false, buffer{dataStart, each})
		}
		q.publish()
	}
	taken := func(n int) {
		for i := 0; s.Stats().InFlight < n; i++ {
			if time.Sleep(time.Millisecond); i > 5000 {
				t.Fatalf("%d requests of %d in flight", s.Stats().InFlight, n)
			}
		}
	}
	done := 0
	commit := func() {
		select {
		case commits <- struct{}{}:
			done++
		case <-time.After(5 * time.Second):
			t.Errorf("nothing is committed any more, after %d writes", done)
			close(commits)
			m.disconnect()
			t.FailNow()
		}
	}
	submit(held)
	q.queue(virtio.BlkFlushCache, 0, false)
	submit(2) // which wait, for the share is in use
	taken(held + 3)
	for range held {
		commit()
	}
	for i := 0; s.Stats().InFlight > 3; i++ { // so that the share is free
		if time.Sleep(time.Millisecond); i > 5000 {
			t.Fatalf("%d requests in flight", s.Stats().InFlight)
		}
	}
	q.pop()
	submit(held) // while the only worker is at the flush, what was given back is not theirs
	taken(held + 3)
	close(flushed)
	for range held + 2 {
		commit()
	}
}

// A volume that goes away is no failed disk: the connection is cut, the request stays.
func TestVolumeLost(t *testing.T) {
	for _, op := range []nbdtest.Op{nbdtest.OpTryRead, nbdtest.OpTryStage, nbdtest.OpTryCommit, nbdtest.OpFlush, nbdtest.OpTrim} {
		v := nbdtest.New("vol", volumeBytes)
		v.Hook = func(_ context.Context, o nbdtest.Op, _, _ int64) error {
			if o == op || op == nbdtest.OpTryRead && o == nbdtest.OpRead || op != nbdtest.OpTryRead && (o == nbdtest.OpStage || o == nbdtest.OpCommit) {
				return fmt.Errorf("a test: %w", block.ErrStale)
			}
			return nil
		}
		s, _ := newServer(t, Options{Volume: v})
		m := newMachine(t, s, setup{features: disk})
		m.start()
		q := m.vqs[0]
		a := buffer{dataStart, 4096}
		switch op {
		case nbdtest.OpTryRead:
			q.queue(virtio.BlkIn, 0, true, a)
		case nbdtest.OpFlush:
			q.queue(virtio.BlkFlushCache, 0, false)
		case nbdtest.OpTrim:
			r := buffer{dataStart, virtio.BlkRangeBytes}
			virtio.BlkRange{Sectors: 8}.Put(m.data(r))
			q.queue(virtio.BlkDiscardRange, 0, false, r)
		default:
			q.queue(virtio.BlkOut, 0, false, a)
		}
		q.publish()
		if err := m.cut(); !errors.Is(err, block.ErrStale) {
			t.Errorf("%s: the connection ended with %v", op, err)
		}
		if n := q.pop(); n != 0 {
			t.Errorf("%s: %d requests were completed", op, n)
		}
		if st := s.Stats(); st.Disconnects != 0 {
			t.Errorf("%s: counted as a front-end that breaks rules", op)
		}
	}
}

// Memory comes and goes beside requests.
func TestMemorySlots(t *testing.T) {
	s, _ := newServer(t, Options{})
	m := newMachine(t, s, setup{features: disk})
	if n := m.number(vhost.GetMaxMemSlots); n != maxSlots {
		t.Errorf("%d slots", n)
	}
	// Rings and the first data in one slot, more data in a second one that comes later.
	first := vhost.Region{Guest: guestBase, Size: dataStart + 1<<20, User: userBase}
	second := vhost.Region{Guest: guestBase + first.Size, Size: 1 << 20, User: userBase + first.Size, Offset: first.Size}
	must(t, m.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, first), m.fd))
	q := m.vqs[0]
	must(t, q.start(q.drv.Base()))
	a := buffer{dataStart, 4096}
	b := buffer{int(first.Size) - 4096, 8192} // half in each
	if code := q.do(virtio.BlkIn, 0, true, a); code != virtio.BlkOK {
		t.Errorf("in the first slot: status %d", code)
	}
	must(t, m.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, second), m.fd))
	pattern(m.data(b), 7)
	if code := q.do(virtio.BlkOut, 0, false, b); code != virtio.BlkOK {
		t.Errorf("across two slots: status %d", code)
	}
	clear(m.data(b))
	if code := q.do(virtio.BlkIn, 0, true, b); code != virtio.BlkOK || !bytes.Equal(m.data(b), patterned(8192, 7)) {
		t.Errorf("back from there: status %d", code)
	}
	must(t, m.ack(vhost.RemMemReg, vhost.AppendMemRegion(nil, second)))
	if code := q.do(virtio.BlkIn, 0, true, a); code != virtio.BlkOK {
		t.Errorf("with one slot less: status %d", code)
	}
	q.queue(virtio.BlkIn, 0, true, b)
	q.publish()
	if err := m.cut(); err == nil || !strings.Contains(err.Error(), "not in the driver's memory") {
		t.Errorf("memory that was taken away: %v", err)
	}
}

// The log of dirty pages has the pages that were written to, and no others.
func TestDirtyLog(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		s, _ := newServer(t, Options{})
		m := newMachine(t, s, setup{features: f | disk})
		m.start()
		q := m.vqs[0]
		fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		must(t, err)
		defer func() { _ = unix.Close(fd) }()
		const bytesOfLog = (guestBase + memBytes) / 4096 / 8
		must(t, unix.Ftruncate(fd, bytesOfLog))
		log, err := unix.Mmap(fd, 0, bytesOfLog, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		must(t, err)
		defer func() { _ = unix.Munmap(log) }()
		m.send(vhost.SetLogBase, vhost.Log{Size: bytesOfLog}.Append(nil), fd)
		if _, err := m.receive(vhost.SetLogBase); err != nil {
			t.Fatal(err)
		}
		m.features |= virtio.Set(vhost.FLogAll)
		must(t, m.ack(vhost.SetFeatures, vhost.AppendU64(nil, uint64(m.features))))
		desc, driver, device, _, heads := m.parts()
		at := func(off int) uint64 { return userBase + uint64(q.base+off) }
		// As QEMU does it, packed or not.
		usedLog := guestBase + uint64(q.base+device)
		must(t, m.ack(vhost.SetVringAddr, vhost.VringAddr{
			Flags: vhost.VringLog, Desc: at(desc), Avail: at(driver), Used: at(device), Log: usedLog,
		}.Append(nil)))
		a := buffer{dataStart + 100, 8192}
		if code := q.do(virtio.BlkIn, 0, true, a); code != virtio.BlkOK {
			t.Fatalf("read: status %d", code)
		}
		page := func(addr uint64) bool { return log[addr/4096/8]>>(addr/4096%8)&1 != 0 }
		for _, addr := range []uint64{guestBase + dataStart, guestBase + dataStart + 4096, guestBase + dataStart + 8192, guestBase + uint64(q.base+heads), usedLog, guestBase + uint64(q.base+desc)} {
			if addr == guestBase+uint64(q.base+desc) && !f.Has(virtio.FRingPacked) {
				continue // of a split queue the driver alone writes descriptors
			}
			if !page(addr) {
				t.Errorf("the page at %#x is not marked", addr)
			}
		}
		n := 0
		for addr := uint64(guestBase); addr < guestBase+memBytes; addr += 4096 {
			if page(addr) {
				n++
			}
		}
		want := 5
		if f.Has(virtio.FRingPacked) {
			want++
		}
		if n != want {
			t.Errorf("%d pages are marked", n)
		}
	})
}

// A queue that was stopped goes on where it was, and one that is disabled does nothing.
func TestStopAndGoOn(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		s, _ := newServer(t, Options{})
		m := newMachine(t, s, setup{features: f | disk, track: true})
		m.start()
		q := m.vqs[0]
		a := buffer{dataStart, 4096}
		for round := range 5 {
			for range 9 * (round + 1) {
				if code := q.do(virtio.BlkOut, 8, false, a); code != virtio.BlkOK {
					t.Fatalf("round %d: status %d", round, code)
				}
			}
			base := q.stop()
			if f.Has(virtio.FRingPacked) != (base>>16 != 0) && base != 0 {
				t.Fatalf("round %d: base %#x", round, base)
			}
			id := q.queue(virtio.BlkOut, 8, false, a)
			q.drv.Publish()
			time.Sleep(5 * time.Millisecond)
			if q.pop() != 0 {
				t.Fatal("a queue that was stopped completes requests")
			}
			must(t, q.start(base))
			q.notify()
			if code := q.wait(id); code != virtio.BlkOK {
				t.Fatalf("round %d, after the stop: status %d", round, code)
			}
		}
		must(t, m.ack(vhost.SetVringEnable, vhost.VringState{Num: 0}.Append(nil)))
		id := q.queue(virtio.BlkIn, 0, true, a)
		q.publish()
		time.Sleep(5 * time.Millisecond)
		if q.pop() != 0 {
			t.Fatal("a queue that is disabled completes requests")
		}
		must(t, m.ack(vhost.SetVringEnable, vhost.VringState{Num: 1}.Append(nil)))
		q.wait(id)
		must(t, m.ack(vhost.SetStatus, vhost.AppendU64(nil, 15)))
		if st := m.number(vhost.GetStatus); st != 15 {
			t.Errorf("device status %d", st)
		}
		must(t, m.ack(vhost.ResetDevice, nil))
		if st := m.number(vhost.GetStatus); st != 0 || s.Stats().Queues != 0 {
			t.Errorf("after a reset: device status %d, %d queues run", st, s.Stats().Queues)
		}
		q.drv.Reset()
		must(t, q.start(q.drv.Base()))
		if code := q.do(virtio.BlkIn, 0, true, a); code != virtio.BlkOK {
			t.Errorf("a queue that begins anew: status %d", code)
		}
	})
}

// A front-end without a kick descriptor is looked after all the same.
func TestWithoutKick(t *testing.T) {
	s, _ := newServer(t, Options{})
	m := newMachine(t, s, setup{features: disk})
	m.start()
	must(t, m.ack(vhost.SetVringKick, vhost.AppendU64(nil, uint64(vhost.NoFile))))
	if code := m.vqs[0].do(virtio.BlkIn, 0, true, buffer{dataStart, 4096}); code != virtio.BlkOK {
		t.Errorf("status %d", code)
	}
}
