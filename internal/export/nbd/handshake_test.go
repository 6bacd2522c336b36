package nbd

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
)

const testSize = 1 << 20

func TestExportNamePadding(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{})
	for flags, pad := range map[uint32]int{0: 124, flagFixedNewstyle: 124, flagFixedNewstyle | flagNoZeroes: 0} {
		c := h.dialUnix().hello(flags)
		c.write(optionBytes(optExportName, []byte("v")))
		b := c.read(10 + pad)
		if size := binary.BigEndian.Uint64(b); size != testSize {
			t.Errorf("flags %d: size %d", flags, size)
		}
		c.expect(eOK, cmdWrite, 0, 0, 512, pattern(1, 512))
	}
	c := h.dialUnix().hello(flagFixedNewstyle)
	c.write(optionBytes(optExportName, []byte("nobody")))
	c.expectCut()
}

func TestClientFlagsUnknown(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{})
	h.dialUnix().hello(1 << 5).expectCut()
}

func TestOptionReplies(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{Options: 100})
	c := h.dialUnix().hello(flagFixedNewstyle)
	c.expectOption(4711, []byte("x"), repErrUnsup)
	c.expectOption(4, nil, repErrUnsup)  // PEEK_EXPORT
	c.expectOption(11, nil, repErrUnsup) // EXTENDED_HEADERS
	c.expectOption(optList, []byte("x"), repErrInvalid)
	c.expectOption(optStartTLS, nil, repErrPolicy)
	c.expectOption(optStructured, []byte("x"), repErrInvalid)
	c.expectOption(optSetContext, contextData("v", contextAllocation), repErrInvalid) // not structured
	c.expectOption(optInfo, goData("nobody"), repErrUnknown)
	c.expectOption(optInfo, nil, repErrInvalid)
	c.expectOption(optInfo, append(goData("v"), 0), repErrInvalid)
	c.expectOption(optInfo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, repErrInvalid)
	c.expectOption(optInfo, []byte{0, 0, 0, 0, 0xff, 0xff}, repErrInvalid)
	c.expectOption(optInfo, goData("\xff\xfe"), repErrInvalid)
	c.expectOption(optInfo, goData(strings.Repeat("n", 5000)), repErrTooBig)
	c.expectOption(optGo, make([]byte, 100<<10), repErrTooBig)
	c.expectOption(optStructured, nil, repAck)
	c.expectOption(optAbort, nil, repAck)
	c.expectCut()
}

func TestInfo(t *testing.T) {
	v := nbdtest.New("vol", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "vol", Description: "a disk", Volume: v}}}})
	c := h.dialUnix().hello(flagFixedNewstyle)
	got := map[uint16]string{}
	for _, r := range c.expectOption(optInfo, goData("", infoName, infoDescription, infoBlockSize, 999), repAck) {
		if r.kind == repInfo {
			got[binary.BigEndian.Uint16(r.data)] = string(r.data[2:])
		}
	}
	if got[infoName] != "vol" || got[infoDescription] != "a disk" {
		t.Errorf("name and description: %v", got)
	}
	if got[infoBlockSize] != "\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00" {
		t.Errorf("block sizes: %x", got[infoBlockSize])
	}
	want := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendZeroes | flagMultiConn | flagSendCache | flagSendFastZero)
	if f := binary.BigEndian.Uint16([]byte(got[infoExport])[8:]); f != want {
		t.Errorf("transmission flags %#x, want %#x", f, want)
	}
	c.enterAfter("vol", want|flagSendDF)
}

// enterAfter negotiates structured replies and checks the flags of GO.
func (c *client) enterAfter(name string, want uint16) {
	c.t.Helper()
	c.expectOption(optStructured, nil, repAck)
	if c.goTo(name); c.flags != want {
		c.t.Errorf("transmission flags %#x, want %#x", c.flags, want)
	}
}

func TestMetaContexts(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{Options: 100})
	c := h.dialUnix().hello(flagFixedNewstyle)
	c.expectOption(optStructured, nil, repAck)
	for _, x := range []struct {
		opt     uint32
		queries []string
		found   int
	}{
		{optListContext, nil, 1},
		{optListContext, []string{"base:"}, 1},
		{optListContext, []string{"base:allocation", "base:"}, 1},
		{optListContext, []string{"base:nothing"}, 0},
		{optListContext, []string{"qemu:"}, 0},
		{optSetContext, nil, 0},
		{optSetContext, []string{"base:"}, 0},
		{optSetContext, []string{"x-y:z", "base:allocation"}, 1},
	} {
		if r := c.expectOption(x.opt, contextData("v", x.queries...), repAck); len(r) != 1+x.found {
			t.Errorf("option %d queries %q: %d contexts, want %d", x.opt, x.queries, len(r)-1, x.found)
		}
	}
	c.expectOption(optSetContext, contextData("v", "nocolon"), repErrInvalid)
	c.expectOption(optSetContext, contextData("nobody", contextAllocation), repErrUnknown)
	c.expectOption(optSetContext, contextData("v", make([]string, 33)...), repErrTooBig)
	c.expectOption(optSetContext, []byte{0, 0, 0, 1, 'v', 0, 0, 0, 1, 0, 0, 0, 9}, repErrInvalid)
	c.structured = true
	c.goTo("v")
	// The last SET_META_CONTEXT failed, so that none is selected.
	c.expect(eInval, cmdBlockStatus, 0, 0, 4096, nil)
}

func TestContextOfAnotherExport(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Volume: v}}}})
	c := h.dialUnix().hello(flagFixedNewstyle)
	c.expectOption(optStructured, nil, repAck)
	c.structured = true
	c.expectOption(optSetContext, contextData("w", contextAllocation), repAck)
	c.goTo("v")
	c.expect(eInval, cmdBlockStatus, 0, 0, 4096, nil)
}

func TestListAndDefault(t *testing.T) {
	v, w := nbdtest.New("v", testSize), nbdtest.New("w", 2*testSize)
	two := &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Description: "second", Volume: w}}}
	h := start(t, Config{Exports: two})
	c := h.dialUnix().hello(flagFixedNewstyle)
	r := c.expectOption(optList, nil, repAck)
	if len(r) != 3 || string(r[0].data) != "\x00\x00\x00\x01v" || string(r[1].data) != "\x00\x00\x00\x01wsecond" {
		t.Errorf("list: %v", r)
	}
	c.expectOption(optGo, goData(""), repErrUnknown)

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
	c := h.dialTCP().hello(flagFixedNewstyle)
	if r := c.expectOption(optList, nil, repAck); len(r) != 2 {
		t.Errorf("a refused client sees %d exports, want 1", len(r)-1)
	}
	c.expectOption(optGo, goData("v"), repErrPolicy)
	c.goTo("w")
	h.dialUnix().enter("v")
	c = h.dialTCP().hello(flagFixedNewstyle)
	c.write(optionBytes(optExportName, []byte("v")))
	c.expectCut()
}

func TestHandover(t *testing.T) {
	h := start(t, Config{Exports: closedExports{}})
	h.dialUnix().hello(flagFixedNewstyle).expectOption(optGo, goData("v"), repErrShutdown)
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
	old.expect(eInval, cmdRead, 0, testSize, 512, nil)
	c := h.dialUnix().enter("v")
	if c.size != 2*testSize {
		t.Errorf("new connection sees %d bytes", c.size)
	}
	c.expect(eOK, cmdRead, 0, testSize, 512, nil)
}
