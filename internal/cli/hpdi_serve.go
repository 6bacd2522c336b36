package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/ring"
)

type hpdiServeOptions struct {
	*session
	ring string
	poll time.Duration
}

func newHPDIServe(s *session) *cobra.Command {
	o := &hpdiServeOptions{session: s}
	c := &cobra.Command{
		Use: "serve URI", Short: "Serve a device over rings in shared memory",
		Long: `Serve a device to programs that open ring:PATH, until SIGINT or SIGTERM. PATH becomes a
socket for any number of them; if it is a file that exists already, or a device, one program at a
time uses a ring in that memory instead. When the command ends, or is killed, requests in flight
stay in the rings of those programs: who serves at PATH next goes on with them.

A file that others have under a lock, and a mounted block device, is not served (lock=off in its
URI overrides that).

` + schemeHelp(),
		Example: "  pollux hpdi serve file:/var/lib/vm1.img --ring /run/vm1.ring\n  pollux hpdi bench 'ring:/run/vm1.ring?queues=2' --depth 32",
		Args:    args("URI"),
		RunE:    func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) },
	}
	c.Flags().StringVar(&o.ring, "ring", "", "path of the socket, or of a file or device that both sides map")
	c.Flags().DurationVar(&o.poll, "poll", 50*time.Microsecond, "how long a queue looks for requests before it sleeps, at most")
	return c
}

func (o *hpdiServeOptions) run(ctx context.Context, uri string) error {
	if o.ring == "" {
		return usagef("say where to serve: --ring PATH")
	}
	if o.poll < 0 {
		return usagef("--poll %v is negative", o.poll)
	}
	dev, err := openDevice(ctx, uri, "lock", "on")
	if err != nil {
		return err
	}
	return closing(dev, o.serve(ctx, dev))
}

func (o *hpdiServeOptions) serve(ctx context.Context, dev hpdi.Device) error {
	log := slog.New(slog.NewTextHandler(o.err, nil))
	s, err := ring.NewServer(dev, ring.ServeOptions{Poll: o.poll, Log: log})
	if err != nil {
		return err
	}
	defer s.Close()
	context.AfterFunc(ctx, s.Close)
	if st, err := os.Stat(o.ring); err == nil && st.Mode()&os.ModeSocket == 0 {
		fmt.Fprintf(o.out, "serving %s in the memory of %s\n", dev.Info().Name, o.ring)
		return s.ServeFile(o.ring, 0)
	}
	l, err := ring.Listen(o.ring)
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Fprintf(o.out, "serving %s at ring:%s\n", dev.Info().Name, o.ring)
	return s.Serve(l)
}
