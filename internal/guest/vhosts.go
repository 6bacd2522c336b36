package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/vhostuser"
	"github.com/pollux-storage/pollux/internal/identity"
)

// vhosts are the sockets at which virtual machines attach to the volumes of a tenancy.
//
// Whoever serves an identity binds them itself, in place of those of whoever served it
// before. They are not held open by the agent, as the sockets of NBD are: a machine that
// connects to a socket at which nobody accepts yet stands still until somebody answers,
// for QEMU talks with the back-end in its main loop. One that is refused runs on and tries
// again.
type vhosts struct {
	cfg      *config.Config
	identity string
	log      *slog.Logger
	wg       sync.WaitGroup // of the servers' loops

	mu     sync.Mutex // guards what follows; held while sockets are changed, for one change at a time
	open   map[block.VolumeID]*vhost
	closed bool
}

// vhost is the socket of one volume. Of what it holds only the name changes.
type vhost struct {
	name     string
	path     string // "" after it could not be renamed
	serial   string
	readOnly bool
	server   *vhostuser.Server
	ln       *net.UnixListener
	why      string // why there is no path; server and ln are nil if there never was one
}

func newVhosts(cfg *config.Config, identity string, log *slog.Logger) *vhosts {
	return &vhosts{cfg: cfg, identity: identity, log: log, open: map[block.VolumeID]*vhost{}}
}

// begin opens the sockets in the background: a pool may have thousands of volumes, and
// whoever calls has other clients to serve. Who asks for the status waits until that
// is done.
func (h *vhosts) begin(st Store, wg *sync.WaitGroup) {
	h.mu.Lock()
	wg.Go(func() {
		defer h.mu.Unlock()
		h.syncLocked(st)
	})
}

// sync brings the sockets in line with the volumes of a store.
func (h *vhosts) sync(st Store) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.syncLocked(st)
}

// syncLocked is sync; without a store there are no volumes.
// What cannot be had is told in the status, and tried again at the next change: the
// volume is served by NBD all the same.
func (h *vhosts) syncLocked(st Store) {
	if h.closed || h.cfg.VhostUser.Off {
		return
	}
	dir := h.cfg.VhostDir(h.identity)
	err := os.MkdirAll(dir, 0o755) // who may connect is said by the sockets, and by DIR
	if err != nil {
		h.log.Warn("no sockets for virtual machines", "identity", h.identity, "error", err)
	}
	var volumes []VolumeInfo
	if st != nil {
		volumes = st.Volumes()
	}
	have := map[block.VolumeID]VolumeInfo{}
	for _, v := range volumes {
		have[v.ID] = v
	}
	// First what goes, so that its name is free.
	for id, x := range h.open {
		if v, ok := have[id]; !ok || x.server == nil || x.path == "" && x.name != v.Name || x.readOnly != h.cfg.Exports[v.Name].ReadOnly {
			h.dropLocked(id)
		}
	}
	for _, v := range volumes {
		x := h.open[v.ID]
		switch {
		case x == nil:
			x = h.offer(st, v, err)
			h.open[v.ID] = x
			if x.why != "" && err == nil {
				h.log.Warn("no socket for virtual machines", "volume", v.Name, "error", x.why)
			}
		case x.name != v.Name:
			h.renameLocked(x, v.Name)
		}
	}
	h.tidyLocked(dir)
}

// offer opens the socket of a volume and serves it.
func (h *vhosts) offer(st Store, v VolumeInfo, err error) *vhost {
	x := &vhost{name: v.Name, readOnly: h.cfg.Exports[v.Name].ReadOnly}
	// It stays the same when the volume is renamed or its pool is moved, and is as long
	// as a virtio disk's may be.
	x.serial = fmt.Sprintf("%.8s-%d", st.Region().Pool, v.ID)
	if err == nil {
		err = h.serve(st, x)
	}
	if err != nil {
		x.why = err.Error()
	}
	return x
}

func (h *vhosts) serve(st Store, x *vhost) error {
	path, err := h.cfg.VhostSocket(h.identity, x.name)
	if err != nil {
		return err
	}
	v, err := st.Volume(x.name)
	if err != nil {
		return err
	}
	srv, err := vhostuser.New(vhostuser.Options{
		Volume: v, Serial: x.serial, ReadOnly: x.readOnly, Queues: h.cfg.VhostUser.Queues, Log: h.log,
	})
	if err != nil {
		return err
	}
	ln, err := identity.ReplaceUnix(path, 0o660)
	if err != nil {
		return err
	}
	x.path, x.server, x.ln = path, srv, ln
	h.wg.Go(func() {
		if err := srv.Serve(context.Background(), ln); err != nil && !errors.Is(err, vhostuser.ErrServerClosed) {
			h.log.Error("no virtual machine can attach any more", "volume", x.name, "error", err)
		}
	})
	return nil
}

// renameLocked gives a socket the new name of its volume. Machines that are attached
// stay so.
func (h *vhosts) renameLocked(x *vhost, name string) {
	path, err := h.cfg.VhostSocket(h.identity, name)
	if err == nil {
		err = os.Rename(x.path, path)
	}
	if err != nil {
		// Another volume may come to have the old name. Who is attached stays so until
		// somebody else serves.
		_ = os.Remove(x.path)
		path, x.why = "", err.Error()
		h.log.Warn("no socket for virtual machines", "volume", name, "error", err)
	}
	x.name, x.path = name, path
}

// dropLocked ends the socket of a volume that is no more.
func (h *vhosts) dropLocked(id block.VolumeID) {
	x := h.open[id]
	delete(h.open, id)
	if x.server == nil {
		return
	}
	if x.path != "" {
		_ = os.Remove(x.path)
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	x.end(ctx)
}

// end cuts clients, after the requests that are under way if these end in time.
func (x *vhost) end(ctx context.Context) {
	_ = x.server.Shutdown(ctx) // whoever was cut comes again
	_ = x.ln.Close()
}

// tidyLocked removes sockets of volumes that are no more: of those deleted or renamed
// just before whoever served them died.
func (h *vhosts) tidyLocked(dir string) {
	known := map[string]bool{}
	for _, x := range h.open {
		known[x.path] = true
	}
	names, _ := filepath.Glob(filepath.Join(dir, "*.sock"))
	for _, n := range names {
		if st, err := os.Lstat(n); err == nil && st.Mode()&os.ModeSocket != 0 && !known[n] {
			_ = os.Remove(n)
		}
	}
}

// resized tells the machines that a volume has another size.
func (h *vhosts) resized(volume string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.open {
		if x.name == volume && x.server != nil {
			x.server.Resized()
		}
	}
}

// close ends all of it, with ctx bounding the wait for requests under way. The sockets
// stay in the file system, for whoever serves next to replace: until then whoever
// connects is refused, and tries again.
func (h *vhosts) close(ctx context.Context) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	var wg sync.WaitGroup
	for _, x := range h.open {
		if x.server != nil {
			wg.Go(func() { x.end(ctx) })
		}
	}
	wg.Wait()
	h.wg.Wait()
}

// status describes the socket of a volume, nil if there shall be none.
func (h *vhosts) status(v VolumeInfo) *control.VhostUser {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	x := h.open[v.ID]
	if x == nil {
		return nil
	}
	s := &control.VhostUser{Socket: x.path, Serial: x.serial, Note: x.why}
	if x.server == nil {
		return s
	}
	if x.path != "" {
		s.URI = "vhost-user:" + escapeSocket(x.path)
		s.QEMU = qemuOptions(v.Name, x.path, h.cfg.VhostUser.Queues)
	}
	t := x.server.Stats()
	s.Clients = t.Clients
	s.VhostCounts = control.VhostCounts{
		Reads: t.Reads, Writes: t.Writes, Flushes: t.Flushes, Discards: t.Discards, WriteZeroes: t.WriteZeroes, Errors: t.Errors,
		Resubmitted: t.Resubmitted, Skipped: t.Skipped, ReadBytes: t.ReadBytes, WrittenBytes: t.WrittenBytes,
	}
	return s
}

// clients returns how many machines are attached to a volume.
func (h *vhosts) clients(volume string) int {
	if h == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.open {
		if x.name == volume && x.server != nil {
			return x.server.Stats().Clients
		}
	}
	return 0
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
