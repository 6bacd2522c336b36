// Package identity holds what clients know a guest by: the listening sockets
// of its addresses.
//
// The agent opens them once. It keeps them, and both guests inherit them, so
// that the sockets exist as long as any of the three processes lives; only the
// guest that serves the identity accepts. While nobody does, clients wait in
// the kernel's backlog instead of being refused, which is what makes a
// takeover look like a pause. A restarted agent gets the sockets from a living
// guest, over a unix socket.
//
// All descriptors of a socket share its non-blocking mode, which the accepting
// process needs; nothing here may switch it off.
//
// Closing a [Sockets] closes this process's descriptors and nothing else: no
// method here ever shuts a listening socket down for the others.
package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Sockets are the listening sockets of one identity.
type Sockets struct {
	Name string
	TCP  *os.File
	Unix *os.File
}

// Listen opens the sockets of an identity. A port of 0 chooses a free one;
// see [Sockets.Port]. The setting says in errors where the addresses come
// from.
func Listen(name, endpoint, path, setting string) (*Sockets, error) {
	tcp, err := net.Listen("tcp", endpoint)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("address %s of %s is in use by another program: end that, or set another %s.address or %s.port: %w", endpoint, name, setting, setting, err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("address %s of %s is not one of this host: add it to an interface, or set another %s.address: %w", endpoint, name, setting, err)
	case err != nil:
		return nil, fmt.Errorf("listen at %s for %s: %w", endpoint, name, err)
	}
	defer tcp.Close()
	ux, err := ListenUnix(path, 0o660)
	if err != nil {
		return nil, fmt.Errorf("%s.socket: %w", setting, err)
	}
	defer ux.Close()
	s := &Sockets{Name: name}
	if s.TCP, err = File(tcp.(*net.TCPListener)); err == nil {
		s.Unix, err = File(ux)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("sockets of %s: %w", name, err)
	}
	return s, nil
}

// File returns a descriptor of a listener's socket. Unlike the listener's own
// File method it never switches the socket to blocking mode: that would do so
// for all processes that have it, and one that accepts could no longer be
// interrupted.
func File(l syscall.Conn) (*os.File, error) {
	rc, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	cerr := rc.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("duplicate a socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "listening socket"), nil
}

// ListenUnix opens a unix socket at path with the given permissions. A socket
// file that nobody listens at any more is replaced; it does not remove the
// file when it is closed.
func ListenUnix(path string, mode os.FileMode) (*net.UnixListener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	return bindUnix("unix", path, path+"~", mode)
}

// bindUnix makes a socket under the name tmp and renames it when its permissions are
// right: nobody can connect in between, and nobody finds half a socket.
func bindUnix(network, path, tmp string, mode os.FileMode) (*net.UnixListener, error) {
	_ = os.Remove(tmp)
	ln, err := net.ListenUnix(network, &net.UnixAddr{Name: tmp, Net: network})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	if err = os.Chmod(tmp, mode); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = ln.Close()
		_ = os.Remove(tmp)
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	return ln, nil
}

// ReplaceUnix opens a unix socket, of the network "unix" or "unixpacket", at path in place of what another guest has listened at
// there, which must be fenced or have let go of it. Whoever connects finds the one or the
// other. What is no socket is not replaced.
func ReplaceUnix(network, path string, mode os.FileMode) (*net.UnixListener, error) {
	if err := replaceable(path); err != nil {
		return nil, err
	}
	// Sockets with other endings may be replaced in the same directory at the same time.
	tmp := "~" + strings.TrimPrefix(filepath.Ext(path), ".")
	return bindUnix(network, path, filepath.Join(filepath.Dir(path), tmp), mode)
}

// RenameUnix gives a socket another path, in place of another socket. What is no socket is
// not replaced.
func RenameUnix(old, path string) error {
	if err := replaceable(path); err != nil {
		return err
	}
	return os.Rename(old, path)
}

// replaceable says why a socket may not take the place of what is at a path.
func replaceable(path string) error {
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is not a socket: remove it", path)
	}
	return nil
}

// removeStale removes the file of a socket at which nobody listens.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is not a socket: remove it, or set another path", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("somebody listens at %s already: end that program, or set another path", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("stale socket: %w", err)
	}
	return nil
}

// Port returns the TCP port.
func (s *Sockets) Port() (int, error) {
	ln, err := net.FileListener(s.TCP)
	if err != nil {
		return 0, fmt.Errorf("socket of %s: %w", s.Name, err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port, nil
}

// Listeners returns listeners for whoever serves the identity now. They are
// descriptors of their own: closing them leaves the sockets open.
func (s *Sockets) Listeners() ([]net.Listener, error) {
	var out []net.Listener
	for _, f := range []*os.File{s.TCP, s.Unix} {
		ln, err := net.FileListener(f)
		if err != nil {
			for _, l := range out {
				_ = l.Close()
			}
			return nil, fmt.Errorf("socket of %s: %w", s.Name, err)
		}
		out = append(out, ln)
	}
	return out, nil
}

// Files returns the descriptors in the order that [FromFiles] takes them.
func Files(sets []*Sockets) []*os.File {
	var out []*os.File
	for _, s := range sets {
		out = append(out, s.TCP, s.Unix)
	}
	return out
}

// FromFiles makes sockets of the named identities from descriptors that were
// inherited or received, and owns them.
func FromFiles(names []string, files []*os.File) ([]*Sockets, error) {
	if len(files) != 2*len(names) {
		return nil, fmt.Errorf("%d descriptors for the sockets of %d identities", len(files), len(names))
	}
	var out []*Sockets
	for i, n := range names {
		out = append(out, &Sockets{Name: n, TCP: files[2*i], Unix: files[2*i+1]})
	}
	return out, nil
}

// Close closes this process's descriptors.
func (s *Sockets) Close() {
	for _, f := range []*os.File{s.TCP, s.Unix} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// maxFiles bounds what one message may carry.
const maxFiles = 16

// Send passes descriptors over a connection, with one byte.
func Send(c *net.UnixConn, files []*os.File) error {
	if len(files) > maxFiles {
		return fmt.Errorf("%d descriptors in one message", len(files))
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	if _, _, err := c.WriteMsgUnix([]byte{'S'}, unix.UnixRights(fds...), nil); err != nil {
		return fmt.Errorf("pass sockets on: %w", err)
	}
	return nil
}

// Receive takes what [Send] sent.
func Receive(c *net.UnixConn) ([]*os.File, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, on, flags, _, err := c.ReadMsgUnix(b[:], oob)
	if err != nil {
		return nil, fmt.Errorf("receive sockets: %w", err)
	}
	files, err := parseRights(oob[:on])
	if err == nil && (n != 1 || b[0] != 'S' || flags&unix.MSG_CTRUNC != 0) {
		err = errors.New("receive sockets: not such a message")
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, err
	}
	return files, nil
}

// parseRights takes the descriptors out of control messages.
func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive sockets: %w", err)
	}
	var files []*os.File
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, fmt.Errorf("receive sockets: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed socket"))
		}
	}
	return files, nil
}
