package nbd

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

const testSize = 1 << 20

func TestExportNamePadding(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{})
	for flags, pad := range map[uint32]int{0: 124, nbdproto.FlagFixedNewstyle: 124, nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes: 0} {
		c := h.dialUnix().hello(flags)
		c.write(optionBytes(nbdproto.OptExportName, []byte("v")))
		b := c.read(10 + pad)
		if size := binary.BigEndian.Uint64(b); size != testSize {
			t.Errorf("flags %d: size %d", flags, size)
		}
		c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 512, pattern(1, 512))
	}
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	c.write(optionBytes(nbdproto.OptExportName, []byte("nobody")))
	c.expectCut()
}

func TestClientFlagsUnknown(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{})
	h.dialUnix().hello(1 << 5).expectCut()
}

func TestOptionReplies(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{Options: 100})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	c.expectOption(4711, []byte("x"), nbdproto.RepErrUnsup)
	c.expectOption(4, nil, nbdproto.RepErrUnsup)  // PEEK_EXPORT
	c.expectOption(11, nil, nbdproto.RepErrUnsup) // EXTENDED_HEADERS
	c.expectOption(nbdproto.OptList, []byte("x"), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepErrPolicy)
	c.expectOption(nbdproto.OptStructured, []byte("x"), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptSetContext, contextData("v", nbdproto.ContextAllocation), nbdproto.RepErrInvalid) // not structured
	c.expectOption(nbdproto.OptInfo, goData("nobody"), nbdproto.RepErrUnknown)
	c.expectOption(nbdproto.OptInfo, nil, nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptInfo, append(goData("v"), 0), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptInfo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptInfo, []byte{0, 0, 0, 0, 0xff, 0xff}, nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptInfo, goData("\xff\xfe"), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptInfo, goData(strings.Repeat("n", 5000)), nbdproto.RepErrTooBig)
	c.expectOption(nbdproto.OptGo, make([]byte, 100<<10), nbdproto.RepErrTooBig)
	c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
	c.expectOption(nbdproto.OptAbort, nil, nbdproto.RepAck)
	c.expectCut()
}

func TestInfo(t *testing.T) {
	v := nbdtest.New("vol", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "vol", Description: "a disk", Volume: v}}}})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	got := map[uint16]string{}
	for _, r := range c.expectOption(nbdproto.OptInfo, goData("", nbdproto.InfoName, nbdproto.InfoDescription, nbdproto.InfoBlockSize, 999), nbdproto.RepAck) {
		if r.kind == nbdproto.RepInfo {
			got[binary.BigEndian.Uint16(r.data)] = string(r.data[2:])
		}
	}
	if got[nbdproto.InfoName] != "vol" || got[nbdproto.InfoDescription] != "a disk" {
		t.Errorf("name and description: %v", got)
	}
	if got[nbdproto.InfoBlockSize] != "\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00" {
		t.Errorf("block sizes: %x", got[nbdproto.InfoBlockSize])
	}
	want := uint16(nbdproto.FlagHasFlags | nbdproto.FlagSendFlush | nbdproto.FlagSendFUA | nbdproto.FlagSendTrim | nbdproto.FlagSendZeroes | nbdproto.FlagMultiConn | nbdproto.FlagSendCache | nbdproto.FlagSendFastZero)
	if f := binary.BigEndian.Uint16([]byte(got[nbdproto.InfoExport])[8:]); f != want {
		t.Errorf("transmission flags %#x, want %#x", f, want)
	}
	c.enterAfter("vol", want|nbdproto.FlagSendDF)
}

// enterAfter negotiates structured replies and checks the flags of GO.
func (c *client) enterAfter(name string, want uint16) {
	c.t.Helper()
	c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
	if c.goTo(name); c.flags != want {
		c.t.Errorf("transmission flags %#x, want %#x", c.flags, want)
	}
}

func TestMetaContexts(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{Options: 100})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
	for _, x := range []struct {
		opt     uint32
		queries []string
		found   int
	}{
		{nbdproto.OptListContext, nil, 1},
		{nbdproto.OptListContext, []string{"base:"}, 1},
		{nbdproto.OptListContext, []string{"base:allocation", "base:"}, 1},
		{nbdproto.OptListContext, []string{"base:nothing"}, 0},
		{nbdproto.OptListContext, []string{"qemu:"}, 0},
		{nbdproto.OptSetContext, nil, 0},
		{nbdproto.OptSetContext, []string{"base:"}, 0},
		{nbdproto.OptSetContext, []string{"x-y:z", "base:allocation"}, 1},
	} {
		if r := c.expectOption(x.opt, contextData("v", x.queries...), nbdproto.RepAck); len(r) != 1+x.found {
			t.Errorf("option %d queries %q: %d contexts, want %d", x.opt, x.queries, len(r)-1, x.found)
		}
	}
	c.expectOption(nbdproto.OptSetContext, contextData("v", "nocolon"), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptSetContext, contextData("nobody", nbdproto.ContextAllocation), nbdproto.RepErrUnknown)
	c.expectOption(nbdproto.OptSetContext, contextData("v", make([]string, 33)...), nbdproto.RepErrTooBig)
	c.expectOption(nbdproto.OptSetContext, []byte{0, 0, 0, 1, 'v', 0, 0, 0, 1, 0, 0, 0, 9}, nbdproto.RepErrInvalid)
	c.structured = true
	c.goTo("v")
	// The last SET_META_CONTEXT failed, so that none is selected.
	c.expect(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 4096, nil)
}

func TestContextOfAnotherExport(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Volume: v}}}})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
	c.structured = true
	c.expectOption(nbdproto.OptSetContext, contextData("w", nbdproto.ContextAllocation), nbdproto.RepAck)
	c.goTo("v")
	c.expect(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 4096, nil)
}

func TestListAndDefault(t *testing.T) {
	v, w := nbdtest.New("v", testSize), nbdtest.New("w", 2*testSize)
	two := &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Description: "second", Volume: w}}}
	h := start(t, Config{Exports: two})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle)
	r := c.expectOption(nbdproto.OptList, nil, nbdproto.RepAck)
	if len(r) != 3 || string(r[0].data) != "\x00\x00\x00\x01v" || string(r[1].data) != "\x00\x00\x00\x01wsecond" {
		t.Errorf("list: %v", r)
	}
	c.expectOption(nbdproto.OptGo, goData(""), nbdproto.RepErrUnknown)

	h = start(t, Config{Exports: two, Default: "w"})
	if c := h.dialUnix().enter(""); c.size != 2*testSize {
		t.Errorf("default export has %d bytes", c.size)
	}
}

func TestAllowList(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{
		{Name: "v", Volume: v, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Name: "w", Volume: v, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8")}},
	}}})
	c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
	if r := c.expectOption(nbdproto.OptList, nil, nbdproto.RepAck); len(r) != 2 {
		t.Errorf("a refused client sees %d exports, want 1", len(r)-1)
	}
	c.expectOption(nbdproto.OptGo, goData("v"), nbdproto.RepErrPolicy)
	c.goTo("w")
	h.dialUnix().enter("v")
	c = h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
	c.write(optionBytes(nbdproto.OptExportName, []byte("v")))
	c.expectCut()
}

func TestHandover(t *testing.T) {
	h := start(t, Config{Exports: closedExports{}})
	h.dialUnix().hello(nbdproto.FlagFixedNewstyle).expectOption(nbdproto.OptGo, goData("v"), nbdproto.RepErrShutdown)
}

// closedExports are those of a pool that was handed over.
type closedExports struct{}

func (closedExports) Lookup(string) (Export, error) { return Export{}, block.ErrClosed }
func (closedExports) List() []Export                { return nil }

func TestResizeSeenByNewConnections(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := serveVolume(t, v, Limits{})
	old := h.dialUnix().enter("v")
	v.Grow(2 * testSize)
	old.expect(nbdproto.EINVAL, nbdproto.CmdRead, 0, testSize, 512, nil)
	c := h.dialUnix().enter("v")
	if c.size != 2*testSize {
		t.Errorf("new connection sees %d bytes", c.size)
	}
	c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, testSize, 512, nil)
}
