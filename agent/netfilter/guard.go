package netfilter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Table is one of the family inet that Guard keeps as it should be. Check and Repair are called one at a time, but beside whatever else the
// table's owner does: where the owner changes rules, chains or sets meanwhile it must not let Check see half of that.
type Table interface {
	Name() string
	Check() error  // nil: it is as it should be
	Repair() error // writes it again
	// Wrote reports whether a transaction was the owner's, by the netlink port that it came from.
	Wrote(port uint32) bool
}

// Guard watches tables of one network namespace, that of the calling thread, until ctx ends. Whenever an nftables transaction that touches
// one of them commits, that one is checked and, where it is not as it should be, reported as an error and written again. Elements of sets do
// not count: whoever keeps verdicts in sets may write thousands a second. Nor do transactions of the table's owner, which would be read back after each edit of
// policy. It returns nil when ctx ended and an error where it cannot watch or
// repair; the pod must then not count as enforced.
//
// Whoever can change a table has CAP_NET_ADMIN in the pod and could do worse; Guard is against mistakes (a flush by hand, another
// tool), not against them.
func Guard(ctx context.Context, logger *slog.Logger, tables ...Table) error {
	g := guard{logger: logger, tables: tables}
	for {
		lost, err := g.watch(ctx)
		if err != nil || ctx.Err() != nil {
			return err
		}
		logger.Warn("netfilter: lost track of nftables changes, watching anew", "cause", lost)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond): // a burst of changes that overflows the socket is still going on
		}
	}
}

type guard struct {
	logger *slog.Logger
	tables []Table
}

// watch repairs on every change until ctx ends (nil, nil), the events stop coming (lost) or a repair fails (err).
func (g *guard) watch(ctx context.Context) (lost, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("netfilter: open netlink: %w", err)
	}
	defer func() { _ = conn.Close() }()
	if err := errors.Join(conn.SetReadBuffer(4<<20), conn.JoinGroup(unix.NFNLGRP_NFTABLES)); err != nil {
		return nil, fmt.Errorf("netfilter: watch nftables: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	for _, t := range g.tables { // what happened before the watch began
		if err := g.repair(t); err != nil {
			return nil, err
		}
	}
	touched := map[string]bool{} // by the transaction that is being told of
	for {
		events, err := conn.Receive()
		if ctx.Err() != nil {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
		for _, e := range events {
			table, committed := event(e)
			touched[table] = true
			if !committed {
				continue
			}
			for _, t := range g.tables {
				if !touched[t.Name()] || t.Wrote(e.Header.PID) {
					continue
				}
				if err := g.repair(t); err != nil {
					return nil, err
				}
			}
			clear(touched)
		}
	}
}

// event tells which table of the family inet an event is about, other than about elements of its sets, and whether it ends a transaction.
func event(m netlink.Message) (table string, committed bool) {
	const (
		header = 4 // nfgenmsg: the family first
		named  = 1 // the attribute with the table's name: NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, …
	)
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < header {
		return "", false
	}
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWGEN:
		return "", true
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		return "", false
	}
	if m.Data[0] != byte(nftables.TableFamilyINet) {
		return "", false
	}
	attributes, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return "", false
	}
	for attributes.Next() {
		if attributes.Type() == named {
			return attributes.String(), false
		}
	}
	return "", false
}

// repair writes a table again if it is not as it should be.
func (g *guard) repair(t Table) error {
	broken := t.Check()
	if broken == nil {
		return nil
	}
	g.logger.Error("netfilter: somebody changed a table of the pod; writing it again", "table", t.Name(), "found", broken)
	if err := t.Repair(); err != nil {
		return err
	}
	if err := t.Check(); err != nil {
		return err
	}
	g.logger.Warn("netfilter: the table is in place again", "table", t.Name())
	return nil
}
