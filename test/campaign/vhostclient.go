package campaign

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/vhostuser"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

// client is one way to a volume. What it does it says in the requests of nbdclient.
type client interface {
	// Do does a request and returns when it was answered.
	Do(ctx context.Context, r *nbdclient.Request) error
	Stats() nbdclient.Stats
	Close()
}

// machine is a volume as a virtual machine has it: its driver keeps what is in flight in
// memory that outlives the server, and never sends anything a second time.
type machine struct {
	dev hpdi.Device
	mem []byte
}

// lane is a queue of a machine with memory for one request.
type lane struct {
	queue hpdi.Queue
	mem   []byte
}

// lanes is a client with so many requests at once.
type lanes struct{ free chan lane }

// newMachine connects to a volume's socket, with so many clients that each do depth requests
// of at most n bytes at once.
func newMachine(ctx context.Context, socket string, clients, depth, n int, packed vhostuser.Choice) (*machine, []client, error) {
	dev, err := vhostuser.Open(ctx, socket, vhostuser.Options{Queues: 2, QueueSize: 16, Packed: packed, Reconnect: healLimit})
	if err != nil {
		return nil, nil, err
	}
	m := &machine{dev: dev}
	if m.mem, err = hpdi.Alloc(clients * depth * n); err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	var all []client
	for i := range clients {
		l := &lanes{make(chan lane, depth)}
		for j := range depth {
			q, err := dev.NewQueue(4)
			if err != nil {
				return nil, nil, errors.Join(err, m.close())
			}
			at := (i*depth + j) * n
			l.free <- lane{q, m.mem[at : at+n : at+n]}
		}
		all = append(all, l)
	}
	return m, all, nil
}

// close ends the connection, with nothing in flight. The clients must be closed before.
func (m *machine) close() error { return errors.Join(m.dev.Close(), hpdi.Free(m.mem)) }

func (l *lanes) Stats() nbdclient.Stats { return nbdclient.Stats{Connects: 1} }

func (l *lanes) Close() {
	for range cap(l.free) {
		x := <-l.free
		_ = x.queue.Close() // nothing is in flight on it
	}
}

func (l *lanes) Do(_ context.Context, r *nbdclient.Request) error {
	x := <-l.free
	defer func() { l.free <- x }()
	req := &hpdi.Request{Offset: r.Offset}
	buf := x.mem[:len(r.Data):len(r.Data)]
	switch r.Command {
	case nbdclient.Read:
		req.Op, req.Vec = hpdi.OpRead, [][]byte{buf}
	case nbdclient.Write:
		copy(buf, r.Data)
		req.Op, req.Vec = hpdi.OpWrite, [][]byte{buf}
	case nbdclient.Trim:
		req.Op, req.Length = hpdi.OpDiscard, int64(r.Length)
	case nbdclient.WriteZeroes:
		req.Op, req.Length = hpdi.OpWriteZeroes, int64(r.Length)
	case nbdclient.Flush:
		req.Op = hpdi.OpFlush
	default:
		return fmt.Errorf("command %d is none of a machine", r.Command)
	}
	sent := time.Now()
	if err := hpdi.Do(x.queue, req); err != nil {
		return err
	}
	copy(r.Data, buf) // of a write it is the same
	r.Attempts = []nbdclient.Attempt{{Sent: sent, Ended: time.Now()}}
	if r.FUA {
		return hpdi.Do(x.queue, &hpdi.Request{Op: hpdi.OpFlush})
	}
	return nil
}
