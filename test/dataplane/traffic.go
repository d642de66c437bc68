package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// appArgument makes this binary an app in a pod: the next argument says which.
const (
	appArgument = "app"
	appServer   = "server"
	appClient   = "client"
)

// Ports of the server.
const (
	portEcho = 9000 // answers what it is sent
	portSink = 9001 // takes what it is sent, and says at the end how much that was: 8 bytes, big-endian
)

// The kinds of traffic.
const (
	kindConnect = "connect" // connections, each for one byte and its echo
	kindRequest = "request" // 64 bytes and their echo, again and again on one connection
	kindBulk    = "bulk"    // as much as goes, in one direction
)

// order is what a client is to do: one kind of traffic, by so many at a time, for a time or until there were Most, whichever comes first.
type order struct {
	Kind    string         `json:"kind"`
	To      netip.AddrPort `json:"to"`
	AtOnce  int            `json:"at_once"`
	For     time.Duration  `json:"for"`
	Most    int            `json:"most,omitempty"` // of all together; 0: time alone ends it
	Patient time.Duration  `json:"patient"`        // how long one connection may take in all
}

// outcome is what came of it.
type outcome struct {
	Error   string        `json:"error,omitempty"`
	Count   int           `json:"count"`   // connections or requests
	Bytes   int64         `json:"bytes"`   // that the server says it got
	Elapsed time.Duration `json:"elapsed"` // from the first to the last
	P50     time.Duration `json:"p50"`
	P99     time.Duration `json:"p99"`
}

// runApp is the main of an app. The server serves until its standard input ends, the client takes orders from there.
func runApp(which string, in io.Reader, out io.Writer) error {
	switch which {
	case appServer:
		if err := serve(out); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, in)
		return err
	case appClient:
		return obey(in, out)
	}
	return fmt.Errorf("app %q: there are %s and %s", which, appServer, appClient)
}

// serve listens on both ports, says so, and serves in the background.
func serve(out io.Writer) error {
	for port, one := range map[int]func(net.Conn) error{portEcho: echo, portSink: sink} {
		lis, err := net.Listen("tcp", fmt.Sprintf(":%d", port)) //nolint:noctx // as long as the process
		if err != nil {
			return err
		}
		go func() {
			for {
				conn, err := lis.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_ = one(conn) // the client notices
				}()
			}
		}()
	}
	return json.NewEncoder(out).Encode(outcome{})
}

func echo(conn net.Conn) error {
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			return err
		}
	}
}

func sink(conn net.Conn) error {
	var total uint64
	for buf := make([]byte, bulkWrite); ; {
		n, err := conn.Read(buf)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			return binary.Write(conn, binary.BigEndian, total)
		}
		if err != nil {
			return err
		}
	}
}

// obey takes one order after the other.
func obey(in io.Reader, out io.Writer) error {
	orders, outcomes := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o order
		err := orders.Decode(&o)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		got, err := o.do()
		if err != nil {
			got.Error = err.Error()
		}
		if err := outcomes.Encode(got); err != nil {
			return err
		}
	}
}

// do makes the traffic. Whatever fails, one connection among thousands, fails the order.
func (o order) do() (outcome, error) {
	one := map[string]func(*worker) error{kindConnect: (*worker).connects, kindRequest: (*worker).requests, kindBulk: (*worker).sends}[o.Kind]
	if one == nil || o.AtOnce < 1 || o.For <= 0 || o.Patient <= 0 {
		return outcome{}, fmt.Errorf("order %+v: no such thing", o)
	}
	began := time.Now()
	workers := make([]*worker, o.AtOnce)
	errs := make([]error, o.AtOnce)
	var all sync.WaitGroup
	for i := range workers {
		workers[i] = &worker{order: o, until: began.Add(o.For), most: (o.Most + o.AtOnce - 1) / o.AtOnce}
		all.Go(func() { errs[i] = one(workers[i]) })
	}
	all.Wait()
	got := outcome{Elapsed: time.Since(began)}
	var took []time.Duration
	for _, w := range workers {
		took = append(took, w.took...)
		got.Bytes += w.bytes
	}
	if err := errors.Join(errs...); err != nil {
		return got, err
	}
	got.Count = len(took)
	if len(took) > 0 {
		slices.Sort(took)
		got.P50, got.P99 = took[len(took)/2], took[len(took)*99/100]
	}
	return got, nil
}

// worker does its part of an order.
type worker struct {
	order
	until time.Time
	most  int
	begun bool
	took  []time.Duration
	bytes int64
}

// more says whether to go on: once at least, though on a busy machine the time may be over before anything has begun.
func (w *worker) more() bool {
	if !w.begun {
		w.begun = true
		return true
	}
	return time.Now().Before(w.until) && (w.most == 0 || len(w.took) < w.most)
}

func (w *worker) dial() (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", w.To.String(), w.Patient) //nolint:noctx // bounded by Patient
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(w.Patient + w.For))
}

// connects measures connections from connect() to the echo of the first byte.
func (w *worker) connects() error {
	for b := []byte{'x'}; w.more(); {
		began := time.Now()
		conn, err := w.dial()
		if err != nil {
			return err
		}
		if _, err = conn.Write(b); err == nil {
			_, err = io.ReadFull(conn, b)
		}
		w.took = append(w.took, time.Since(began))
		if err = errors.Join(err, conn.Close()); err != nil {
			return fmt.Errorf("connection to %s: %w", w.To, err)
		}
	}
	return nil
}

// requestBytes is how long a request and its answer are.
const requestBytes = 64

func (w *worker) requests() error {
	conn, err := w.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	b := make([]byte, requestBytes)
	for w.more() {
		began := time.Now()
		if _, err := conn.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, b); err != nil {
			return err
		}
		w.took = append(w.took, time.Since(began))
	}
	return nil
}

// bulkWrite is how much is written at a time.
const bulkWrite = 256 << 10

// sends counts what has arrived: time goes on until the server has said so.
func (w *worker) sends() error {
	conn, err := w.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	var sent uint64
	for b := make([]byte, bulkWrite); w.more(); {
		n, err := conn.Write(b)
		sent += uint64(n)
		if err != nil {
			return err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	var got uint64
	if err := binary.Read(conn, binary.BigEndian, &got); err != nil {
		return err
	}
	if got != sent {
		return fmt.Errorf("%d bytes were sent to %s, %d arrived", sent, w.To, got)
	}
	w.bytes = int64(got)
	return nil
}
