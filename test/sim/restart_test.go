package sim

import "testing"

// Runs do open pools by restart records: what the simulator says of them would be worth nothing
// otherwise.
func TestRestartRecords(t *testing.T) {
	s, err := Parse("restarts", `
seed 7
pool a disks=3 size=48M
pool b disks=1 size=48M
volume v0 on a 4M
c1 write v0 0 64K
settle
kill a
sleep 5s
c1 write v0 64K 64K
create v1 on a 2M
settle
kill a
kill b
sleep 5s
add a
kill a
sleep 5s
verify
`)
	if err != nil {
		t.Fatal(err)
	}
	r := Run(t, s, *trail)
	if r.Err != nil {
		t.Fatalf("%v\nthe end of the trace:\n%s", r.Err, r.Trace)
	}
	if r.Recalled < 3 {
		t.Errorf("%d pools were opened by their records:\n%s", r.Recalled, r.Trace)
	}
	if raced {
		return
	}
	if again := Run(t, s, 0); again.Hash != r.Hash {
		t.Error("the same run is another one")
	}
}
