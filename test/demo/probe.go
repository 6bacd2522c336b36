package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"
)

// probe is a small NBD client that writes one block after the other, waits for
// each reply, and connects again when its connection ends. The time
// from the last reply on one connection to the first on the next is the pause
// that a client sees.
type probe struct {
	socket, export string

	mu     sync.Mutex
	last   time.Time // of the latest reply
	fresh  bool      // the connection is new: no reply on it yet
	pauses           // since the latest reset
	writes int
	err    error // the first write that the server answered with an error
}

// pauses are the longest times between two replies.
type pauses struct {
	reconnect time.Duration // from one connection to the next: what a takeover costs
	other     time.Duration // on one connection: what the load costs
}

// The numbers of the NBD protocol that a client as plain as this one needs.
const (
	nbdMagic        = "NBDMAGICIHAVEOPT"
	nbdOption       = "IHAVEOPT"
	nbdFixedNoZeros = 3
	nbdExportName   = 1
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698
	nbdWrite        = 1
	nbdDisconnect   = 2
)

const (
	probeBlock  = 4096
	probeBlocks = 1024
	// probePatience bounds one wait for a reply; a pause is far shorter.
	probePatience = 30 * time.Second
)

// run writes until ctx ends.
func (p *probe) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := p.connection(ctx); err != nil && ctx.Err() == nil {
			// Connections end when a guest dies; what counts is how long it
			// takes until writes are answered again.
			select {
			case <-ctx.Done():
			case <-time.After(time.Millisecond):
			}
		}
	}
}

func (p *probe) connection(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	conn.SetDeadline(time.Now().Add(probePatience))
	r := bufio.NewReader(conn)
	if err := handshake(conn, r, p.export); err != nil {
		return err
	}
	p.mu.Lock()
	p.fresh = true
	p.mu.Unlock()
	payload := make([]byte, probeBlock)
	for n := uint64(0); ; n++ {
		if ctx.Err() != nil {
			return request(conn, nbdDisconnect, n, 0, nil)
		}
		conn.SetDeadline(time.Now().Add(probePatience))
		binary.LittleEndian.PutUint64(payload, n)
		if err := request(conn, nbdWrite, n, int64(n%probeBlocks)*probeBlock, payload); err != nil {
			return err
		}
		if err := p.reply(r, n); err != nil {
			return err
		}
	}
}

func handshake(w io.Writer, r io.Reader, export string) error {
	hello := make([]byte, len(nbdMagic)+2)
	if _, err := io.ReadFull(r, hello); err != nil {
		return err
	}
	if string(hello[:len(nbdMagic)]) != nbdMagic {
		return errors.New("the socket does not speak NBD")
	}
	b := binary.BigEndian.AppendUint32(nil, nbdFixedNoZeros)
	b = append(b, nbdOption...)
	b = binary.BigEndian.AppendUint32(b, nbdExportName)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	if _, err := w.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(r, make([]byte, 8+2)) // size and flags of the export
	return err
}

func request(w io.Writer, kind uint16, cookie uint64, off int64, payload []byte) error {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28+len(payload)), nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	_, err := w.Write(append(b, payload...))
	return err
}

func (p *probe) reply(r io.Reader, cookie uint64) error {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint32(b[:]) != nbdReplyMagic || be.Uint64(b[8:]) != cookie {
		return errors.New("the reply belongs to no request")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if errno := be.Uint32(b[4:]); errno != 0 {
		err := fmt.Errorf("a write was answered with error %d", errno)
		if p.err == nil && errno != nbdShutdown {
			p.err = err
		}
		return err
	}
	now := time.Now()
	switch gap := now.Sub(p.last); {
	case p.last.IsZero():
	case p.fresh:
		p.reconnect = max(p.reconnect, gap)
	default:
		p.other = max(p.other, gap)
	}
	p.last, p.fresh = now, false
	p.writes++
	return nil
}

// nbdShutdown is the error of a server that is going away: the client is to
// connect again.
const nbdShutdown = 108

// reset forgets the pauses so far.
func (p *probe) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pauses = pauses{}
}

// result returns the pauses since the latest reset, the number of writes
// answered so far, and the first error that a client should not see.
func (p *probe) result() (pauses, int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pauses, p.writes, p.err
}

// answered waits until the probe has more than n answered writes.
func (p *probe) answered(ctx context.Context, n int) error {
	for {
		if _, writes, _ := p.result(); writes > n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no write answered on %s: %w", p.socket, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// newProbe returns a probe of an export, given its nbd+unix URI.
func newProbe(uri string) (*probe, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	socket := u.Query().Get("socket")
	if socket == "" {
		return nil, fmt.Errorf("%s names no socket", uri)
	}
	return &probe{socket: socket, export: strings.TrimPrefix(u.Path, "/")}, nil
}
