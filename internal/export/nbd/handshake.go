package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// errAborted is the polite end of a negotiation.
var errAborted = errors.New("client ended the negotiation")

// handshake negotiates one connection. It runs on the connection's reader
// goroutine; all its reads and writes are under one deadline.
type handshake struct {
	cfg    *Config
	limits Limits
	nc     net.Conn
	in     *wire
	addr   netip.Addr // of a TCP client; invalid otherwise
	unix   bool

	fixed     bool // client speaks fixed newstyle
	noZeroes  bool
	encrypted bool
	out       bytes.Buffer // replies not yet sent

	// claim tells the server which export the connection has in hand; it is
	// called with anyExport before one is looked up (see Server.CloseExport).
	claim func(name string)

	// Negotiated state; TLS clears it.
	structured     bool
	contextExport  string // what SET_META_CONTEXT was about
	contextChosen  bool
	enterRequested *negotiated // the export of a successful GO or EXPORT_NAME
}

// run returns what was settled. errAborted, errDisconnect and errStopped are
// not faults.
func (h *handshake) run() (*negotiated, error) {
	deadline := time.Now().Add(h.limits.Handshake)
	h.in.limit(deadline)
	_ = h.nc.SetWriteDeadline(deadline)
	h.put64(nbdproto.MagicServer)
	h.put64(nbdproto.MagicOption)
	h.put16(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes)
	if err := h.send(); err != nil {
		return nil, err
	}
	b, err := h.in.take(4)
	if err != nil {
		return nil, h.slow(err)
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(nbdproto.FlagFixedNewstyle|nbdproto.FlagNoZeroes) != 0 {
		return nil, fmt.Errorf("%w: unknown client flags %#x", errProtocol, flags)
	}
	h.fixed, h.noZeroes = flags&nbdproto.FlagFixedNewstyle != 0, flags&nbdproto.FlagNoZeroes != 0
	for range h.limits.Options {
		if err := h.option(); err != nil {
			return nil, h.slow(err)
		}
		if h.enterRequested != nil {
			_ = h.nc.SetWriteDeadline(time.Time{})
			h.in.unlimit()
			return h.enterRequested, nil
		}
	}
	return nil, fmt.Errorf("%w: more than %d options in one negotiation", errProtocol, h.limits.Options)
}

// slow names the deadline as the cause where it was.
func (h *handshake) slow(err error) error {
	if errors.Is(err, errPayloadSlow) {
		return fmt.Errorf("client did not finish the negotiation within %v", h.limits.Handshake)
	}
	return err
}

// option receives and answers one option.
func (h *handshake) option() error {
	b, err := h.in.take(nbdproto.OptHeaderSize)
	if err != nil {
		return err
	}
	if m := binary.BigEndian.Uint64(b); m != nbdproto.MagicOption {
		return fmt.Errorf("%w: option starts with %#016x instead of %#016x", errProtocol, m, uint64(nbdproto.MagicOption))
	}
	opt, n := binary.BigEndian.Uint32(b[8:]), int(binary.BigEndian.Uint32(b[12:]))
	if n > h.limits.OptionBytes {
		return h.tooLong(opt, n)
	}
	data, err := h.in.take(n)
	if err != nil {
		return err
	}
	if opt == nbdproto.OptExportName {
		return h.exportName(string(data))
	}
	if !h.fixed {
		return fmt.Errorf("%w: option %d without fixed newstyle", errProtocol, opt)
	}
	if opt == nbdproto.OptAbort {
		h.reply(opt, nbdproto.RepAck, nil)
		_ = h.send() // the client may be gone, as the protocol lets it
		return errAborted
	}
	if err := h.answer(opt, data); err != nil {
		return err
	}
	return h.send()
}

// tooLong skips the data of an option that exceeds the limit, if that is
// bearable.
func (h *handshake) tooLong(opt uint32, n int) error {
	if opt == nbdproto.OptExportName || n > maxSkipBytes {
		return fmt.Errorf("%w: option %d with %d bytes of data", errProtocol, opt, n)
	}
	if err := h.in.discard(int64(n)); err != nil {
		return err
	}
	h.refuse(opt, nbdproto.RepErrTooBig, fmt.Sprintf("option data is limited to %d bytes", h.limits.OptionBytes))
	return h.send()
}

// answer queues the replies to an option.
func (h *handshake) answer(opt uint32, data []byte) error {
	if opt == nbdproto.OptStartTLS {
		return h.startTLS(data)
	}
	if h.tlsForced() && !h.encrypted {
		h.refuse(opt, nbdproto.RepErrTLSReqd, "this server requires TLS")
		return nil
	}
	switch opt {
	case nbdproto.OptList:
		h.list(data)
	case nbdproto.OptInfo, nbdproto.OptGo:
		h.info(opt, data)
	case nbdproto.OptStructured:
		if len(data) != 0 {
			h.refuse(opt, nbdproto.RepErrInvalid, "this option has no data")
			return nil
		}
		h.structured = true
		h.reply(opt, nbdproto.RepAck, nil)
	case nbdproto.OptListContext, nbdproto.OptSetContext:
		h.context(opt, data)
	default:
		h.refuse(opt, nbdproto.RepErrUnsup, "unknown option")
	}
	return nil
}

// tlsForced reports whether nothing but STARTTLS and ABORT is allowed in clear.
func (h *handshake) tlsForced() bool {
	return h.cfg.TLS.Mode == TLSRequired && !(h.unix && h.cfg.TLS.FreeUnix)
}

func (h *handshake) startTLS(data []byte) error {
	switch {
	case h.cfg.TLS.Mode == TLSOff:
		h.refuse(nbdproto.OptStartTLS, nbdproto.RepErrPolicy, "TLS is not set up on this server")
		return nil
	case len(data) != 0:
		h.refuse(nbdproto.OptStartTLS, nbdproto.RepErrInvalid, "this option has no data")
		return nil
	case h.encrypted:
		h.refuse(nbdproto.OptStartTLS, nbdproto.RepErrInvalid, "the connection is encrypted already")
		return nil
	case h.in.buffered() > 0:
		// Bytes in clear behind STARTTLS would be taken for encrypted ones.
		return fmt.Errorf("%w: data in clear after STARTTLS", errProtocol)
	}
	h.reply(nbdproto.OptStartTLS, nbdproto.RepAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	// What was negotiated in clear may be a forgery and is forgotten.
	h.structured, h.contextChosen, h.contextExport = false, false, ""
	secure := tls.Server(h.nc, h.cfg.TLS.Config)
	if err := secure.Handshake(); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	h.nc, h.encrypted = secure, true
	h.in.attach(secure)
	return nil
}

// exportName enters the transmission phase the old way, which knows no error
// but the end of the connection.
func (h *handshake) exportName(name string) error {
	if h.tlsForced() && !h.encrypted {
		return fmt.Errorf("export %q: client did not start TLS, which is required", name)
	}
	n, refusal := h.find(name)
	if refusal != nil {
		return fmt.Errorf("export %q: %w", name, refusal)
	}
	h.put64(n.size)
	h.put16(n.flags)
	if !h.noZeroes {
		h.out.Write(make([]byte, 124))
	}
	h.enterRequested = n
	return h.send()
}

// refusal is why a client does not get an export.
type refusal struct {
	reply uint32
	why   string
}

func (r *refusal) Error() string { return r.why }

// find looks an export up and settles its transmission flags.
func (h *handshake) find(name string) (*negotiated, *refusal) {
	if len(name) > nbdproto.MaxStringBytes {
		return nil, &refusal{nbdproto.RepErrTooBig, fmt.Sprintf("export names are limited to %d bytes", nbdproto.MaxStringBytes)}
	}
	h.claim(anyExport)
	e, err := h.lookup(name)
	h.claim(e.Name)
	switch {
	case errors.Is(err, block.ErrClosed), errors.Is(err, block.ErrStale):
		return nil, &refusal{nbdproto.RepErrShutdown, "export is moving to another guest"}
	case errors.Is(err, block.ErrNotFound):
		return nil, &refusal{nbdproto.RepErrUnknown, "no such export"}
	case err != nil:
		return nil, &refusal{nbdproto.RepErrUnknown, err.Error()}
	case e.RequireTLS && !h.encrypted:
		return nil, &refusal{nbdproto.RepErrTLSReqd, "this export requires TLS"}
	case !e.allows(h.addr):
		return nil, &refusal{nbdproto.RepErrPolicy, fmt.Sprintf("address %v may not use this export", h.addr)}
	}
	n := &negotiated{
		export: e, size: uint64(e.Volume.Info().Size), structured: h.structured,
		flags:      nbdproto.FlagHasFlags | nbdproto.FlagSendFlush | nbdproto.FlagSendFUA | nbdproto.FlagMultiConn | nbdproto.FlagSendCache,
		allocation: h.contextChosen && h.contextExport == name,
	}
	if h.structured {
		n.flags |= nbdproto.FlagSendDF
	}
	if e.readOnly() {
		n.flags |= nbdproto.FlagReadOnly
	} else {
		n.flags |= nbdproto.FlagSendTrim | nbdproto.FlagSendZeroes | nbdproto.FlagSendFastZero
	}
	return n, nil
}

// lookup resolves the empty name to the default export.
func (h *handshake) lookup(name string) (Export, error) {
	if name != "" {
		return h.cfg.Exports.Lookup(name)
	}
	if h.cfg.Default != "" {
		return h.cfg.Exports.Lookup(h.cfg.Default)
	}
	if all := h.cfg.Exports.List(); len(all) == 1 {
		return all[0], nil
	}
	return Export{}, block.ErrNotFound
}

// send writes the queued replies.
func (h *handshake) send() error {
	_, err := h.nc.Write(h.out.Bytes())
	h.out.Reset()
	if errors.Is(err, net.ErrClosed) {
		return errStopped
	}
	return err
}

func (h *handshake) put16(v uint16) { h.out.Write(binary.BigEndian.AppendUint16(nil, v)) }
func (h *handshake) put32(v uint32) { h.out.Write(binary.BigEndian.AppendUint32(nil, v)) }
func (h *handshake) put64(v uint64) { h.out.Write(binary.BigEndian.AppendUint64(nil, v)) }

// reply queues one reply to an option.
func (h *handshake) reply(opt, kind uint32, data []byte) {
	h.put64(nbdproto.MagicOptReply)
	h.put32(opt)
	h.put32(kind)
	h.put32(uint32(len(data)))
	h.out.Write(data)
}

// refuse queues an error reply with a text for people.
func (h *handshake) refuse(opt, kind uint32, why string) {
	h.reply(opt, kind, []byte(why[:min(len(why), nbdproto.MaxStringBytes)]))
}
