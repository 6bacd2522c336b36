package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/vhostuser"
)

// newVhosts returns the sockets at which virtual machines attach.
func newVhosts(cfg *config.Config, identity string, log *slog.Logger) *sockets {
	return newSockets(cfg, identity, log, protocol{
		scheme: "vhost-user", network: "unix", who: "virtual machines",
		off: cfg.VhostUser.Off, dir: cfg.VhostDir(identity), ending: ".sock", path: cfg.VhostSocket,
		newServer: func(v block.Volume, x *socket) (server, error) {
			s, err := vhostuser.New(vhostuser.Options{
				Volume: v, Serial: x.serial, ReadOnly: x.readOnly, Queues: cfg.VhostUser.Queues, Log: log,
			})
			return vhostServer{s}, err
		},
	})
}

type vhostServer struct{ *vhostuser.Server }

func (s vhostServer) Serve(l *net.UnixListener) error {
	if err := s.Server.Serve(context.Background(), l); !errors.Is(err, vhostuser.ErrServerClosed) {
		return err
	}
	return nil
}

func (s vhostServer) Shutdown(ctx context.Context) { _ = s.Server.Shutdown(ctx) }

func (s vhostServer) Stats() (int, control.SocketCounts) {
	t := s.Server.Stats()
	return t.Clients, control.SocketCounts{
		Reads: t.Reads, Writes: t.Writes, Flushes: t.Flushes, Discards: t.Discards, WriteZeroes: t.WriteZeroes, Errors: t.Errors,
		Resubmitted: t.Resubmitted, Skipped: t.Skipped, ReadBytes: t.ReadBytes, WrittenBytes: t.WrittenBytes,
	}
}

// vhostStatus describes how virtual machines attach to a volume, nil if they cannot.
func vhostStatus(h *sockets, v VolumeInfo) *control.VhostUser {
	s, x := h.status(v)
	if s == nil {
		return nil
	}
	u := &control.VhostUser{VolumeSocket: *s, Serial: x.serial}
	if s.Socket != "" {
		u.QEMU = qemuOptions(v.Name, s.Socket, h.cfg.VhostUser.Queues)
	}
	return u
}

// qemuOptions are the arguments of QEMU that attach a volume to a machine of 2 GiB.
// QEMU looks again for a back-end that has gone after one second, the least that it can.
func qemuOptions(volume, socket string, queues int) []string {
	id := "pollux-" + volume
	return []string{
		"-m", "2G", "-object", "memory-backend-memfd,id=mem,size=2G,share=on", "-machine", "memory-backend=mem",
		"-chardev", "socket,id=" + id + ",path=" + strings.ReplaceAll(socket, ",", ",,") + ",reconnect=1",
		"-device", fmt.Sprintf("vhost-user-blk-pci,chardev=%s,num-queues=%d,packed=on", id, min(queues, 4)),
	}
}
