package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
)

func newHPDI(s *session) *cobra.Command {
	return group("hpdi", groupStorage, "Look at, measure and copy devices by their URIs",
		`The device interface of Pollux (HPDI) reaches files, block devices, NBD exports,
vhost-user back-ends and memory in one way. These commands use it without a pair.

`+schemeHelp(), newHPDIInfo(s), newHPDIBench(s), newHPDICopy(s), newHPDIServe(s))
}

// schemeHelp lists what can be opened.
func schemeHelp() string {
	var b strings.Builder
	b.WriteString("A device is named by a URI, with properties behind a question mark:\n")
	for _, s := range open.Schemes() {
		fmt.Fprintf(&b, "  %-30s  %s\n", s.Form, s.Meaning)
	}
	b.WriteString(`"pollux hpdi info" lists the properties of each.`)
	return b.String()
}

// openDevice opens a device, with properties that its scheme may know and the URI need
// not give.
func openDevice(ctx context.Context, uri string, properties ...string) (hpdi.Device, error) {
	if _, _, err := open.Settings(uri); err != nil {
		return nil, usagef("%w", err)
	}
	for ; len(properties) > 0; properties = properties[2:] {
		var err error
		if uri, err = open.With(uri, properties[0], properties[1]); err != nil {
			return nil, usagef("%w", err)
		}
	}
	return open.Open(ctx, uri)
}

type hpdiInfoOptions struct{ *session }

func newHPDIInfo(s *session) *cobra.Command {
	o := &hpdiInfoOptions{s}
	c := &cobra.Command{
		Use: "info [URI]", Short: "Show the properties of a device, or of all kinds of devices",
		Long: `Open a device and show what its URI takes, with the values that it has, and what the
device says of itself. Without a URI: show what there is to open. Nothing is written.

` + schemeHelp(),
		Example: "  pollux hpdi info file:/dev/vdb?direct=on\n  pollux hpdi info --json nbd://storage/vm1",
		Args: func(c *cobra.Command, got []string) error {
			if len(got) > 1 {
				return usagef("%q is one word too many; usage: %s", got[1], c.UseLine())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return o.schemes()
			}
			return o.run(c.Context(), args[0])
		},
	}
	s.jsonFlag(c)
	return c
}

// hpdiProperty is a property for programs.
type hpdiProperty struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	Value   *string  `json:"value,omitempty"` // of something that is open
	Default string   `json:"default,omitempty"`
	Range   string   `json:"range"`
	Min     *int64   `json:"min,omitempty"` // bytes, or nanoseconds
	Max     *int64   `json:"max,omitempty"`
	Values  []string `json:"values,omitempty"`
	Meaning string   `json:"meaning"`
}

func propertyOf(p hpdi.Property) hpdiProperty {
	out := hpdiProperty{Name: p.Name, Type: string(p.Type), Default: p.Default, Range: p.Range(), Values: p.Values, Meaning: p.Meaning}
	if p.Min != 0 || p.Max != 0 {
		out.Min, out.Max = &p.Min, &p.Max
	}
	return out
}

func settingsOf(list []hpdi.Setting) []hpdiProperty {
	out := make([]hpdiProperty, 0, len(list))
	for _, s := range list {
		p := propertyOf(s.Property)
		p.Value = &s.Value
		out = append(out, p)
	}
	return out
}

// hpdiInfo is a device for programs.
type hpdiInfo struct {
	URI        string         `json:"uri"`
	Scheme     string         `json:"scheme"`
	Properties []hpdiProperty `json:"properties"` // of the URI
	Device     []hpdiProperty `json:"device"`     // what it says of itself
}

func (o *hpdiInfoOptions) run(ctx context.Context, uri string) error {
	scheme, set, err := open.Settings(uri)
	if err != nil {
		return usagef("%w", err)
	}
	d, err := openDevice(ctx, uri)
	if err != nil {
		return err
	}
	info := d.Info()
	if err := d.Close(); err != nil {
		return err
	}
	if o.json {
		return o.printJSON(hpdiInfo{uri, scheme.Name, settingsOf(set), settingsOf(info.List())})
	}
	rows := [][]string{{"PROPERTY", "VALUE", "TAKES", "MEANING"}}
	for _, s := range set {
		rows = append(rows, []string{s.Name, orDash(s.Value), s.Range(), s.Meaning})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	rows = [][]string{{"DEVICE", "VALUE", "MEANING"}}
	for _, s := range info.List() {
		rows = append(rows, []string{s.Name, orDash(s.Value), s.Meaning})
	}
	fmt.Fprintln(o.out)
	return table(o.out, rows)
}

// hpdiScheme is a kind of device for programs.
type hpdiScheme struct {
	Scheme     string         `json:"scheme"`
	Form       string         `json:"form"`
	Meaning    string         `json:"meaning"`
	Properties []hpdiProperty `json:"properties"`
}

func (o *hpdiInfoOptions) schemes() error {
	if o.json {
		var all []hpdiScheme
		for _, s := range open.Schemes() {
			out := hpdiScheme{Scheme: s.Name, Form: s.Form, Meaning: s.Meaning, Properties: []hpdiProperty{}}
			for _, p := range s.Properties {
				out.Properties = append(out.Properties, propertyOf(p))
			}
			all = append(all, out)
		}
		return o.printJSON(all)
	}
	for i, s := range open.Schemes() {
		if i > 0 {
			fmt.Fprintln(o.out)
		}
		fmt.Fprintf(o.out, "%s: %s\n", s.Form, s.Meaning)
		rows := [][]string{{"  PROPERTY", "DEFAULT", "TAKES", "MEANING"}}
		for _, p := range s.Properties {
			rows = append(rows, []string{"  " + p.Name, orDash(p.Default), p.Range(), p.Meaning})
		}
		if err := table(o.out, rows); err != nil {
			return err
		}
	}
	return nil
}

// closing closes a device after something else, whose error comes first.
func closing(d hpdi.Device, err error) error { return errors.Join(err, d.Close()) }
