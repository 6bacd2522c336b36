package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
	"github.com/pollux-storage/pollux/internal/export/vhostuser"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/rawvolume"
)

type vhostUserBlkOptions struct {
	*session
	socket       string
	fd           int
	capabilities bool
	device       string
	readOnly     bool
	queues       int
}

func newVhostUserBlk(s *session) *cobra.Command {
	o := &vhostUserBlkOptions{session: s}
	c := &cobra.Command{
		Use: "vhost-user-blk", GroupID: groupStorage,
		Short: "Serve any file or device as the disk of a virtual machine",
		Long: `Serve a file, or any device that can be opened by a URI, as the disk of virtual
machines: a back-end program as QEMU's conventions for vhost-user want it. It needs no
pair, and gives none of what a pair gives: the device is used as it is.

Unless it is only read, nobody else must use it: a file that another program has under a
lock, or serves in this way, and a block device that is mounted are refused. lock=off in
the URI overrides that.

It lives until SIGTERM or SIGINT; front-ends may come and go. With --fd it serves the
socket with that number, which listens or is connected; when a connected one is closed
it ends.`,
		Example: `  pollux vhost-user-blk --socket-path /run/vm1.sock --blk-file /srv/images/vm1.raw
  pollux vhost-user-blk --socket-path /run/vm2.sock --blk-file 'nbd://10.0.0.5/vm2'`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context(), c.Flags().Changed("fd")) },
	}
	f := c.Flags()
	f.StringVar(&o.socket, "socket-path", "", "where to listen")
	f.IntVar(&o.fd, "fd", -1, "descriptor of a socket to serve, instead of --socket-path")
	f.BoolVar(&o.capabilities, "print-capabilities", false, "print what the program can do, as JSON, and nothing else")
	f.StringVar(&o.device, "blk-file", "", "the file or block device, or a URI such as nbd://HOST/EXPORT")
	f.BoolVar(&o.readOnly, "read-only", false, "refuse writes")
	f.IntVar(&o.queues, "num-queues", 16, "the most queues that a front-end may have")
	return c
}

// capabilities is VHostUserBackendCapabilities of QEMU's vhost-user.json for a block device.
type capabilities struct {
	Type     string   `json:"type"`
	Features []string `json:"features"`
}

func (o *vhostUserBlkOptions) run(ctx context.Context, byFD bool) error {
	if o.capabilities {
		return o.printJSON(capabilities{Type: "block", Features: []string{"read-only", "blk-file"}})
	}
	switch {
	case o.device == "":
		return usagef("--blk-file is missing: it says what to serve")
	case o.socket == "" && !byFD:
		return usagef("--socket-path or --fd is missing: it says where")
	case o.socket != "" && byFD:
		return usagef("--socket-path and --fd are both given: one is enough")
	case o.queues < 1 || o.queues > vhostuser.MaxQueues:
		return usagef("--num-queues %d makes no sense: it is 1 to %d", o.queues, vhostuser.MaxQueues)
	}
	var properties []string
	if o.readOnly {
		properties = []string{"read-only", "on"} // a file that cannot be written to could not even be opened otherwise
	} else {
		properties = []string{"lock", "on"} // readers may be several
	}
	dev, err := openDevice(ctx, deviceURI(o.device), properties...)
	if err != nil {
		return err
	}
	err = o.serve(ctx, dev)
	return errors.Join(err, dev.Close())
}

// deviceURI returns the URI of what --blk-file names, which may be a plain path.
func deviceURI(name string) string {
	scheme, _, colon := strings.Cut(name, ":")
	if colon && slices.ContainsFunc(open.Schemes(), func(s open.Scheme) bool { return s.Name == strings.ToLower(scheme) }) {
		return name
	}
	return "file:" + (&url.URL{Path: name}).EscapedPath()
}

func (o *vhostUserBlkOptions) serve(ctx context.Context, dev hpdi.Device) error {
	v, err := rawvolume.New(o.device, dev)
	if err != nil {
		return err
	}
	s, err := vhostuser.New(vhostuser.Options{
		Volume: v, Serial: serial(o.device), ReadOnly: o.readOnly, Queues: o.queues,
		Log: slog.New(slog.NewTextHandler(o.err, nil)),
	})
	if err != nil {
		return err
	}
	watch, end := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { watchSize(watch, func() int64 { return v.Info().Size }, s.Resized) })
	err = o.accept(ctx, s)
	end()
	wg.Wait()
	if errors.Is(err, vhostuser.ErrServerClosed) || ctx.Err() != nil {
		err = nil // somebody has asked for the end
	}
	return errors.Join(err, v.Close())
}

// watchTime is how often a device is looked at for another size: the disk of another server
// may grow, and nobody says so.
const watchTime = time.Second

// watchSize calls changed after each change of size, until ctx ends.
func watchSize(ctx context.Context, size func() int64, changed func()) {
	tick := time.NewTicker(watchTime)
	defer tick.Stop()
	for seen := size(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := size(); now != seen {
			seen = now
			changed()
		}
	}
}

// stopTime is how long requests that were taken may need when the program is to end.
const stopTime = 5 * time.Second

// serial is what a machine is told as the disk's identity: the end of its name.
func serial(name string) string {
	const most = 20
	return name[max(0, len(name)-most):]
}

// accept serves the socket until it ends, or ctx.
func (o *vhostUserBlkOptions) accept(ctx context.Context, s *vhostuser.Server) error {
	if o.socket != "" {
		l, err := identity.ListenUnix(o.socket, 0o600)
		if err != nil {
			return err
		}
		defer func() { _ = l.Close() }()
		defer func() { _ = os.Remove(o.socket) }() // while nobody else can have taken its place
		return o.listen(ctx, s, l)
	}
	f := os.NewFile(uintptr(o.fd), "socket")
	if f == nil {
		return usagef("--fd %d is no descriptor", o.fd)
	}
	defer func() { _ = f.Close() }()
	listens, err := unix.GetsockoptInt(o.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return usagef("--fd %d is no socket: %w", o.fd, err)
	}
	if listens != 0 {
		l, err := net.FileListener(f)
		if err != nil {
			return fmt.Errorf("--fd %d: %w", o.fd, err)
		}
		defer func() { _ = l.Close() }()
		u, ok := l.(*net.UnixListener)
		if !ok {
			return usagef("--fd %d listens at %v, a unix socket is needed", o.fd, l.Addr())
		}
		u.SetUnlinkOnClose(false)
		return o.listen(ctx, s, u)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("--fd %d: %w", o.fd, err)
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return usagef("--fd %d is connected to %v, a unix socket is needed", o.fd, conn.RemoteAddr())
	}
	defer o.shutdown(ctx, s)()
	return s.ServeConn(context.WithoutCancel(ctx), u)
}

// listen serves a listener until ctx ends: then what was begun is ended.
func (o *vhostUserBlkOptions) listen(ctx context.Context, s *vhostuser.Server, l *net.UnixListener) error {
	defer o.shutdown(ctx, s)()
	return s.Serve(context.WithoutCancel(ctx), l)
}

// shutdown ends the server in good order when ctx ends. What it returns waits for that.
func (o *vhostUserBlkOptions) shutdown(ctx context.Context, s *vhostuser.Server) func() {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		if err := s.Shutdown(limit); err != nil {
			fmt.Fprintf(o.err, "pollux: %v\n", err)
		}
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}
