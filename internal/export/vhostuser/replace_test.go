package vhostuser

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// again connects the machine once more while its connection is there, which it returns as a
// machine of its own.
func (m *machine) again() *machine {
	old := *m
	m.t.Cleanup(old.disconnect)
	m.connect()
	return &old
}

// A front-end that connects again with its area, while a request hangs in the connection
// before, has that one ended first: nothing is run by both, nor completed by both.
func TestTwoConnectionsOneArea(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		v := nbdtest.New("vol", volumeBytes)
		hangs, end := make(chan struct{}, 1), make(chan struct{})
		v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
			switch {
			case op == nbdtest.OpTryCommit && v.Calls(op) == 1:
				return nbdtest.ErrWouldWait
			case op == nbdtest.OpCommit && v.Calls(op) == 1:
				hangs <- struct{}{}
				<-ctx.Done()
				<-end // what is cut may still take a while
			}
			return nil
		}
		s, _ := newServer(t, Options{Volume: v})
		m := newMachine(t, s, setup{features: f | disk, track: true})
		m.start()
		q := m.vqs[0]
		a := buffer{dataStart, 4096}
		pattern(m.data(a), 1)
		write := q.queue(virtio.BlkOut, 8, false, a)
		q.publish()
		<-hangs
		// The answer to this the front-end does not wait for: it hangs, and so nobody at
		// the other end sees a connection that was closed.
		must(t, m.vc.Send(vhost.SetMemTable, vhost.FlagNeedReply, vhost.AppendMemTable(nil, []vhost.Region{regionOf(m)}), m.fd))
		old := m.again()
		time.AfterFunc(20*time.Millisecond, func() { close(end) })
		m.start()
		if code := q.wait(write); code != virtio.BlkOK {
			t.Errorf("the write: status %d", code)
		}
		if err := old.cut(); !errors.Is(err, errReplaced) {
			t.Errorf("the connection before ended with %v", err)
		}
		for i := range 3 * m.size { // a store of the one before would be seen here
			b := buffer{dataStart + 4096, 4096}
			pattern(m.data(b), uint32(i))
			if code := q.do(virtio.BlkOut, 16, false, b); code != virtio.BlkOK {
				t.Fatalf("write %d afterwards: status %d", i, code)
			}
		}
		if got := v.Bytes(4096, 4096); !bytes.Equal(got, patterned(4096, 1)) {
			t.Error("the volume has not what was written")
		}
		if st := s.Stats(); st.Resubmitted+st.Skipped != 1 || st.Disconnects != 0 {
			t.Errorf("%+v", st)
		}
		if n := q.pop(); n != 0 {
			t.Errorf("%d completions more", n)
		}
	})
}

// Memory is added while a request hangs, and can be used at once.
func TestMemoryAddedMeanwhile(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		v := nbdtest.New("vol", volumeBytes)
		end := make(chan struct{})
		v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
			if op == nbdtest.OpFlush {
				<-end
			}
			return nil
		}
		s, _ := newServer(t, Options{Volume: v})
		m := newMachine(t, s, setup{features: f | disk})
		first := vhost.Region{Guest: guestBase, Size: dataStart + 1<<20, User: userBase}
		second := vhost.Region{Guest: guestBase + first.Size, Size: 1 << 20, User: userBase + first.Size, Offset: first.Size}
		must(t, m.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, first), m.fd))
		q := m.vqs[0]
		must(t, q.start(q.drv.Base()))
		flush := q.queue(virtio.BlkFlushCache, 0, false)
		q.publish()
		for s.Stats().InFlight == 0 {
			time.Sleep(time.Millisecond)
		}
		_ = m.conn.SetDeadline(time.Now().Add(5 * time.Second))
		err := m.ack(vhost.AddMemReg, vhost.AppendMemRegion(nil, second), m.fd)
		if err == nil {
			b := buffer{int(first.Size) - 4096, 8192} // half in each
			pattern(m.data(b), 7)
			if code := q.do(virtio.BlkOut, 0, false, b); code != virtio.BlkOK || !bytes.Equal(v.Bytes(0, 8192), patterned(8192, 7)) {
				t.Errorf("across both pieces: status %d", code)
			}
		}
		close(end)
		must(t, err)
		if code := q.wait(flush); code != virtio.BlkOK {
			t.Errorf("the flush: status %d", code)
		}
	})
}
