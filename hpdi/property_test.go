package hpdi

import (
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// knobs has a property of each type.
var knobs = []Property{
	{Name: "direct", Type: TypeBool, Default: "on", Meaning: "Bypass the page cache"},
	{Name: "queues", Type: TypeInt, Default: "4", Min: 1, Max: 64, Meaning: "Number of queues"},
	{Name: "offset", Type: TypeInt, Meaning: "Where to begin"},
	{Name: "size", Type: TypeSize, Min: 4096, Max: 1 << 40, Meaning: "Bytes"},
	{Name: "wait", Type: TypeDuration, Default: "1s", Min: 0, Max: int64(time.Hour), Meaning: "How long to wait"},
	{Name: "rings", Type: TypeEnum, Default: "auto", Values: []string{"auto", "split", "packed"}, Meaning: "Layout of the rings"},
	{Name: "socket", Type: TypeString, Meaning: "Path of the socket"},
}

func TestSettings(t *testing.T) {
	s, err := ParseSettings(knobs, url.Values{})
	if err != nil {
		t.Fatal(err)
	}
	if !s.Bool("direct") || s.Int("queues") != 4 || s.Int("offset") != 0 || s.Size("size") != 0 || s.Duration("wait") != time.Second || s.Text("rings") != "auto" || s.Text("socket") != "" || s.Given("rings") {
		t.Errorf("defaults: %+v", s)
	}
	q, err := url.ParseQuery("direct=no&queues=64&offset=-3&size=1GiB&wait=20ms&rings=packed&socket=/run/a%20b")
	if err != nil {
		t.Fatal(err)
	}
	if s, err = ParseSettings(knobs, q); err != nil {
		t.Fatal(err)
	}
	if s.Bool("direct") || s.Int("queues") != 64 || s.Int("offset") != -3 || s.Size("size") != 1<<30 || s.Duration("wait") != 20*time.Millisecond || s.Text("rings") != "packed" || s.Text("socket") != "/run/a b" || !s.Given("rings") {
		t.Errorf("values: %+v", s)
	}
	var all []string
	for _, v := range s.List() {
		all = append(all, v.Name+"="+v.Value)
	}
	if got := strings.Join(all, " "); got != "direct=no queues=64 offset=-3 size=1GiB wait=20ms rings=packed socket=/run/a b" {
		t.Errorf("list: %s", got)
	}
}

// An error names the property and what it takes.
func TestBadSettings(t *testing.T) {
	for query, want := range map[string]string{
		"quues=3":           `property "quues" is not known here: there are direct, queues, offset, size, wait, rings, socket`,
		"queues=3&queues=4": `property "queues" is given 2 times`,
		"direct=maybe":      `property "direct" (bool: Bypass the page cache): "maybe" is neither on nor off`,
		"direct=":           `property "direct" (bool: Bypass the page cache): "" is neither on nor off`,
		"queues=0":          `property "queues" (int: Number of queues): "0" is not a number from 1 to 64`,
		"queues=65":         `property "queues" (int: Number of queues): "65" is not a number from 1 to 64`,
		"queues=x":          `property "queues" (int: Number of queues): "x" is not a number from 1 to 64`,
		"offset=1.5":        `property "offset" (int: Where to begin): "1.5" is not a number`,
		"size=512":          `property "size" (size: Bytes): "512" is not a size from 4KiB to 1TiB`,
		"size=2TiB":         `property "size" (size: Bytes): "2TiB" is not a size from 4KiB to 1TiB`,
		"wait=1":            `property "wait" (duration: How long to wait): "1" is not a duration from 0s to 1h0m0s`,
		"wait=-1s":          `property "wait" (duration: How long to wait): "-1s" is not a duration from 0s to 1h0m0s`,
		"rings=both":        `property "rings" (enum: Layout of the rings): "both" is not one of auto, split, packed`,
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = ParseSettings(knobs, q); err == nil || err.Error() != want || !errors.Is(err, ErrProperty) {
			t.Errorf("%s: %v, want %s", query, err, want)
		}
	}
	if _, err := ParseSettings(nil, url.Values{"a": {"b"}}); err == nil || err.Error() != `property "a": none are known here` {
		t.Errorf("where there are none: %v", err)
	}
}

// A name or a type that the driver did not declare is a mistake of its author.
func TestSettingsOfOtherNames(t *testing.T) {
	s, err := ParseSettings(append(slices.Clone(knobs), Property{Name: "broken", Type: TypeInt, Default: "x"}), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, ask := range map[string]func(){
		"no such name":      func() { s.Text("nothing") },
		"another type":      func() { s.Size("queues") },
		"default of no use": func() { s.Int("broken") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: nothing happens", name)
				}
			}()
			ask()
		}()
	}
}

// What is listed of a device is what Info says, and reads back.
func TestInfoList(t *testing.T) {
	i := Info{Name: "disk", Driver: "mem", Size: 3 << 20, BlockSize: 4096, Discard: true, Status: true, Cancel: CancelQueued, Note: "slow"}
	got := map[string]string{}
	for _, s := range i.List() {
		got[s.Name] = s.Value
		if s.Meaning == "" || s.Type == "" {
			t.Errorf("%s has no meaning or type", s.Name)
		}
		if _, err := s.parse(s.Value); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
	}
	for name, want := range map[string]string{
		"name": "disk", "driver": "mem", "size": "3MiB", "block-size": "4KiB", "direct": "off", "shared-memory": "off", "discard": "on",
		"write-zeroes": "off", "durable": "off", "read-only": "off", "rotates": "off", "block-status": "on",
		"event": "off", "thread": "off", "cancel": "queued", "note": "slow",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if i.Plain() != (Info{Name: "disk", Driver: "mem", Size: 3 << 20, BlockSize: 4096, Discard: true, Note: "slow"}) {
		t.Errorf("plain: %+v", i.Plain())
	}
}
