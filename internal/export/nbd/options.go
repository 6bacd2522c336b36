package nbd

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// cursor takes the data of an option apart. After a field that is not there,
// bad is set and all further fields are zero.
type cursor struct {
	rest []byte
	bad  bool
}

func (c *cursor) bytes(n uint32) []byte {
	if c.bad || uint64(n) > uint64(len(c.rest)) {
		c.bad = true
		return nil
	}
	b := c.rest[:n]
	c.rest = c.rest[n:]
	return b
}

func (c *cursor) u16() uint16 {
	if b := c.bytes(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.bytes(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// str takes a string with its length in front.
func (c *cursor) str() string { return string(c.bytes(c.u32())) }

// whole reports whether the data had exactly the fields that were taken.
func (c *cursor) whole() bool { return !c.bad && len(c.rest) == 0 }

// list answers LIST with the exports that this client may know of.
func (h *handshake) list(data []byte) {
	if len(data) != 0 {
		h.refuse(nbdproto.OptList, nbdproto.RepErrInvalid, "this option has no data")
		return
	}
	for _, e := range h.cfg.Exports.List() {
		if e.RequireTLS && !h.encrypted || !e.allows(h.addr) {
			continue
		}
		d := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		d = append(append(d, e.Name...), e.Description...)
		h.reply(nbdproto.OptList, nbdproto.RepServer, d)
	}
	h.reply(nbdproto.OptList, nbdproto.RepAck, nil)
}

// info answers INFO and GO.
func (h *handshake) info(opt uint32, data []byte) {
	c := cursor{rest: data}
	name := c.str()
	count := c.u16()
	var wantName, wantDescription bool
	for range count {
		switch kind := c.u16(); {
		case c.bad:
		case kind == nbdproto.InfoName:
			wantName = true
		case kind == nbdproto.InfoDescription:
			wantDescription = true
		}
		if c.bad {
			break
		}
	}
	if !c.whole() || !utf8.ValidString(name) {
		h.refuse(opt, nbdproto.RepErrInvalid, "the option's lengths do not add up, or the name is not UTF-8")
		return
	}
	n, refusal := h.find(name)
	if refusal != nil {
		h.refuse(opt, refusal.reply, refusal.why)
		return
	}
	d := binary.BigEndian.AppendUint16(nil, nbdproto.InfoExport)
	d = binary.BigEndian.AppendUint64(d, n.size)
	h.reply(opt, nbdproto.RepInfo, binary.BigEndian.AppendUint16(d, n.flags))
	if wantName {
		h.infoString(opt, nbdproto.InfoName, n.export.Name)
	}
	if wantDescription && n.export.Description != "" {
		h.infoString(opt, nbdproto.InfoDescription, n.export.Description)
	}
	d = binary.BigEndian.AppendUint16(nil, nbdproto.InfoBlockSize)
	d = binary.BigEndian.AppendUint32(d, minBlock)
	d = binary.BigEndian.AppendUint32(d, preferredBlock)
	h.reply(opt, nbdproto.RepInfo, binary.BigEndian.AppendUint32(d, block.MaxIO))
	h.reply(opt, nbdproto.RepAck, nil)
	if opt == nbdproto.OptGo {
		h.enterRequested = n
	}
}

func (h *handshake) infoString(opt uint32, kind uint16, s string) {
	h.reply(opt, nbdproto.RepInfo, append(binary.BigEndian.AppendUint16(nil, kind), s...))
}

// context answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) context(opt uint32, data []byte) {
	if opt == nbdproto.OptSetContext {
		h.contextChosen, h.contextExport = false, "" // even when this one fails
	}
	if !h.structured {
		h.refuse(opt, nbdproto.RepErrInvalid, "metadata contexts need structured replies first")
		return
	}
	c := cursor{rest: data}
	name := c.str()
	count := c.u32()
	if int64(count) > int64(h.limits.MetaQueries) {
		h.refuse(opt, nbdproto.RepErrTooBig, fmt.Sprintf("at most %d queries are allowed", h.limits.MetaQueries))
		return
	}
	match := count == 0 && opt == nbdproto.OptListContext
	for range count {
		switch q := c.str(); {
		case q == nbdproto.ContextAllocation:
			match = true
		case q == "base:" && opt == nbdproto.OptListContext:
			match = true
		case !c.bad && !strings.Contains(q, ":"):
			h.refuse(opt, nbdproto.RepErrInvalid, "a query needs a namespace and a colon")
			return
		}
	}
	if !c.whole() || !utf8.ValidString(name) {
		h.refuse(opt, nbdproto.RepErrInvalid, "the option's lengths do not add up, or the name is not UTF-8")
		return
	}
	if _, refusal := h.find(name); refusal != nil {
		h.refuse(opt, refusal.reply, refusal.why)
		return
	}
	if match {
		id := uint32(0) // LIST reserves the number
		if opt == nbdproto.OptSetContext {
			id, h.contextChosen, h.contextExport = contextAllocationID, true, name
		}
		h.reply(opt, nbdproto.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), nbdproto.ContextAllocation...))
	}
	h.reply(opt, nbdproto.RepAck, nil)
}
