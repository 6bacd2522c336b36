package vhostuser

import (
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/eventfd"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// FuzzConversation: whatever a front-end says, with memory and eventfds beside it, and
// whatever is in its memory, the server ends when it is gone, with nothing left of it.
//
// The input is what the memory begins with, 16 KiB of it, and messages: a byte with the
// request, one with the descriptors that come with it, one with the payload's length, the
// payload.
func FuzzConversation(f *testing.F) {
	say := func(b []byte, r vhost.Request, files byte, payload []byte) []byte {
		return append(append(b, byte(r), files, byte(len(payload))), payload...)
	}
	state := func(n uint32) []byte { return vhost.VringState{Num: n}.Append(nil) }
	for _, features := range []virtio.Features{disk | virtio.Set(virtio.FVersion1), disk | virtio.Set(virtio.FVersion1, virtio.FRingPacked)} {
		b := make([]byte, 16<<10)
		virtio.PutSplitDesc(b, 0, virtio.Desc{Addr: guestBase + 12288, Len: 16, Flags: virtio.DescNext, Next: 1})
		virtio.PutSplitDesc(b, 1, virtio.Desc{Addr: guestBase + 12400, Len: 1, Flags: virtio.DescWrite})
		virtio.BlkHeader{Type: virtio.BlkFlushCache}.Put(b[12288:])
		b[4096+2] = 1
		b = say(b, vhost.SetProtocolFeatures, 0, vhost.AppendU64(nil, uint64(offeredProtocol)))
		b = say(b, vhost.SetFeatures, 0, vhost.AppendU64(nil, uint64(features)))
		b = say(b, vhost.GetInflightFD, 0, vhost.Inflight{Queues: 1, QueueSize: 16}.Append(nil))
		b = say(b, vhost.SetMemTable, 1, vhost.AppendMemTable(nil, []vhost.Region{{Guest: guestBase, Size: 1 << 20, User: userBase}}))
		b = say(b, vhost.SetVringNum, 0, state(16))
		b = say(b, vhost.SetVringBase, 0, state(0))
		b = say(b, vhost.SetVringAddr, 0, vhost.VringAddr{Desc: userBase, Avail: userBase + 4096, Used: userBase + 8192}.Append(nil))
		b = say(b, vhost.SetVringCall, 2, vhost.AppendU64(nil, 0))
		b = say(b, vhost.SetVringKick, 2, vhost.AppendU64(nil, 0))
		b = say(b, vhost.SetVringEnable, 0, state(1))
		b = say(b, vhost.GetVringBase, 0, state(0))
		b = say(b, vhost.RemMemReg, 0, vhost.AppendMemRegion(nil, vhost.Region{Guest: guestBase, Size: 1 << 20, User: userBase}))
		b = say(b, vhost.AddMemReg, 1, vhost.AppendMemRegion(nil, vhost.Region{Guest: guestBase, Size: 1 << 20, User: userBase}))
		b = say(b, vhost.SetLogBase, 1, vhost.Log{Size: 4096, Offset: 65536}.Append(nil))
		b = say(b, vhost.GetConfig, 0, vhost.Config{Size: 60, Data: make([]byte, 60)}.Append(nil))
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 16<<10 || len(b) > 32<<10 {
			return
		}
		s, err := New(Options{Volume: nbdtest.New("vol", 1<<20), Log: slog.New(slog.DiscardHandler), Queues: 2, QueueSize: 16})
		must(t, err)
		fd, err := unix.MemfdCreate("machine", unix.MFD_CLOEXEC)
		must(t, err)
		defer func() { _ = unix.Close(fd) }()
		must(t, unix.Ftruncate(fd, 1<<20))
		_, err = unix.Pwrite(fd, b[:16<<10], 0)
		must(t, err)
		event := newEventfd(t)
		defer func() { _ = unix.Close(event) }()
		ours, theirs := socketpair(t)
		_ = ours.SetDeadline(time.Now().Add(5 * time.Second))
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = s.ServeConn(t.Context(), theirs)
		}()
		vc := vhost.NewConn(ours)
		for b = b[16<<10:]; len(b) >= 3; {
			r, kind, n := vhost.Request(b[0]), b[1], min(int(b[2]), len(b)-3)
			var files []int
			switch kind % 4 {
			case 1:
				files = []int{fd}
			case 2:
				files = []int{event}
				eventfd.Count(event)
			case 3:
				files = []int{fd, event}
			}
			if vc.Send(r, 0, b[3:3+n], files...) != nil {
				break
			}
			b = b[3+n:]
		}
		_ = ours.Close()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatal("the server does not end")
		}
		if st := s.Stats(); st.Clients != 0 || st.Queues != 0 || st.InFlight != 0 {
			t.Fatalf("%+v", st)
		}
	})
}
