package counting

import (
	"bytes"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// What was written is read, whatever was in its place before: data of all numbers, and
// metadata; and each is counted as what it is.
func TestDevice(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		d, err := New(64*block.Size, dir)
		if err != nil {
			t.Fatal(err)
		}
		d.SetFirst(8 * block.Size)
		q, _ := d.NewQueue(1)
		do := func(op hpdi.Op, b int64, p []byte) {
			t.Helper()
			if err := hpdi.Do(q, &hpdi.Request{Op: op, Offset: b * block.Size, Vec: [][]byte{p}}); err != nil {
				t.Fatal(err)
			}
		}
		page := bytes.Repeat([]byte{7}, block.Size)
		data := func(number uint64) []byte {
			p := make([]byte, block.Size)
			Content(p, number)
			return p
		}
		if !bytes.Equal(data(0), Pattern[:]) || bytes.Equal(data(1), data(2)) {
			t.Fatal("contents of numbers are not as they should be")
		}
		for i, p := range [][]byte{data(0), data(5), page, data(1 << 40), data(0), page, data(6)} {
			do(hpdi.OpWrite, 20, p)
			do(hpdi.OpWrite, 21, data(9))
			got := make([]byte, 2*block.Size)
			do(hpdi.OpRead, 20, got)
			if !bytes.Equal(got[:block.Size], p) || !bytes.Equal(got[block.Size:], data(9)) {
				t.Errorf("write %d: something else is read", i)
			}
		}
		do(hpdi.OpWrite, 3, page)
		if c := d.Count(); c.Data != 12*block.Size || c.Pages != 2*block.Size || c.Journal != block.Size {
			t.Errorf("%+v", c)
		}
	}
}
