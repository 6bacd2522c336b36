package guest

import (
	"log/slog"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/ring"
)

// ringPoll is how long a queue of a ring looks for requests before it sleeps, at most.
const ringPoll = 50 * time.Microsecond

// newRings returns the sockets at which programs open volumes over rings in shared memory.
func newRings(cfg *config.Config, identity string, log *slog.Logger) *sockets {
	return newSockets(cfg, identity, log, protocol{
		scheme: "ring", network: "unixpacket", who: "rings",
		off: cfg.Rings.Off, dir: cfg.RingDir(identity), ending: ".ring", path: cfg.RingSocket,
		newServer: func(v block.Volume, x *socket) (server, error) {
			s, err := ring.New(ring.Options{Volume: v, ReadOnly: x.readOnly, Poll: ringPoll, Rings: cfg.Rings.Clients, Log: log})
			return ringServer{s}, err
		},
	})
}

type ringServer struct{ *ring.Server }

func (s ringServer) Stats() (int, control.SocketCounts) {
	t := s.Server.Stats()
	return t.Rings, control.SocketCounts{
		Reads: t.Reads, Writes: t.Writes, Flushes: t.Flushes, Discards: t.Discards, WriteZeroes: t.WriteZeroes, Errors: t.Errors,
		Resubmitted: t.Rerun, Skipped: t.Skipped, ReadBytes: t.ReadBytes, WrittenBytes: t.WrittenBytes,
	}
}
