package relay

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	pauseFirst = 100 * time.Millisecond // before the second attempt at a control plane; doubled with each that follows
	pauseMax   = 5 * time.Second
)

// serveEnvoy is the handler of Envoy's stream.
func (r *Relay) serveEnvoy(down grpc.ServerStream) error {
	ctx, cancel := context.WithCancelCause(down.Context())
	defer cancel(nil)
	defer context.AfterFunc(r.closed, func() { cancel(errStopping) })()
	out := newOutbox()
	side := &envoySide{send: out.put, end: cancel}
	if !r.do(ctx, func() { r.machine.envoyComes(side) }) {
		return status.Error(codes.Unavailable, errStopping.Error())
	}
	r.begin(func() { cancel(out.drain(ctx, func(b []byte) error { return down.SendMsg(&frame{b}) })) })
	r.begin(func() { cancel(r.receiveFromEnvoy(ctx, side, down)) })
	<-ctx.Done() // also where the relay was closed before one of them began
	r.do(r.closed, func() { r.machine.envoyGoes(side) })
	err := context.Cause(ctx)
	if r.closed.Err() != nil {
		err = errStopping
	}
	r.logger.Info("relay: envoy's stream ended", "reason", err)
	return status.Error(codes.Unavailable, err.Error())
}

func (r *Relay) receiveFromEnvoy(ctx context.Context, side *envoySide, down grpc.ServerStream) error {
	for {
		f := new(frame)
		if err := down.RecvMsg(f); err != nil {
			return errors.New("closed by envoy")
		}
		req, err := parseRequest(f.bytes)
		if err != nil {
			return err
		}
		if !r.do(ctx, func() {
			if r.machine.envoy == side {
				err = r.machine.fromEnvoy(req)
			}
		}) {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// keepConnected keeps a stream to the control plane for as long as the relay lives.
func (r *Relay) keepConnected() {
	select {
	case <-r.ready:
	case <-r.closed.Done():
		return
	}
	for r.pause() {
		ended, answered, err := r.connect()
		switch {
		case r.closed.Err() != nil:
			return
		case ended:
			r.logger.Debug("relay: a new stream to the control plane, for what envoy holds has changed")
			continue
		}
		r.note(err)
		if status.Code(err) == codes.Unauthenticated {
			r.refused()
		}
		if answered {
			r.logger.Warn("relay: lost the control plane; envoy keeps what it has", "error", err)
			continue
		}
		r.logger.Warn("relay: cannot reach the control plane", "error", err)
		r.do(r.closed, func() { r.machine.planeIsDown("control plane: " + err.Error()) })
	}
}

// connect opens a stream and serves it until it ends: by the machine (ended), or with an error, before or after the control plane has answered.
func (r *Relay) connect() (ended, answered bool, _ error) {
	ctx, cancel := context.WithCancel(r.closed)
	defer cancel()
	desc := &grpc.StreamDesc{StreamName: methodDelta, ClientStreams: true, ServerStreams: true}
	up, err := r.upstream.NewStream(ctx, desc, "/"+serviceName+"/"+methodDelta)
	if err != nil {
		return false, false, err
	}
	wake := make(chan struct{}, 1)
	side := &planeSide{wake: func() { poke(wake) }}
	byMachine := false
	side.end = func() {
		byMachine = true
		cancel()
	}
	side.answers = r.subscriptions(side)
	if !r.do(ctx, func() { r.machine.planeComes(side) }) {
		return false, false, ctx.Err()
	}
	r.logger.Info("relay: connected to the control plane")
	if !r.begin(func() { r.sendToPlane(ctx, side, wake, up) }) {
		return false, false, errStopping
	}
	for err == nil {
		if err = r.receiveFromPlane(ctx, side, up); err == nil && !answered {
			answered = true
			r.answered()
		}
	}
	if !r.do(r.closed, func() { r.machine.planeGoes(side) }) { // from here on nobody ends it
		return false, false, errStopping
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the control plane ended the stream")
	}
	return byMachine, answered, err
}

func (r *Relay) sendToPlane(ctx context.Context, side *planeSide, wake <-chan struct{}, up grpc.ClientStream) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
		var list [][]byte
		if !r.do(ctx, func() { list = r.machine.requests(side) }) {
			return
		}
		for _, m := range list {
			if up.SendMsg(&frame{m}) != nil {
				return // the next receive says how the stream ended
			}
		}
	}
}

// receiveFromPlane takes one response; it is for the agent or for Envoy.
func (r *Relay) receiveFromPlane(ctx context.Context, side *planeSide, up grpc.ClientStream) error {
	f := new(frame)
	if err := up.RecvMsg(f); err != nil {
		return err
	}
	resp, err := parseResponse(f.bytes)
	if err != nil {
		return err
	}
	if o := r.own[resp.typeURL]; o != nil {
		if resp.nonce == "" {
			return errors.New("the control plane sent a response for the agent without a nonce")
		}
		o.coming.Add(1)
		select {
		case o.responses <- ownResponse{side, resp}:
			return nil
		case <-ctx.Done():
			o.coming.Add(-1)
			return ctx.Err()
		}
	}
	if !r.do(ctx, func() { err = r.machine.fromPlane(side, resp) }) {
		return ctx.Err()
	}
	return err
}

// note counts a failure and keeps its reason.
func (r *Relay) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures++
	r.trouble = "control plane: " + err.Error()
}

// answered ends a row of failures.
func (r *Relay) answered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures, r.trouble = 0, ""
}

// pause waits as long as the failures in a row ask for, with a quarter of jitter: many sidecars lose a control plane at once. False: the
// relay is closed.
func (r *Relay) pause() bool {
	r.mu.Lock()
	n := r.failures
	r.mu.Unlock()
	if n == 0 {
		return r.closed.Err() == nil
	}
	d := min(pauseFirst<<min(n-1, 10), pauseMax)
	timer := time.NewTimer(d + time.Duration(rand.Int64N(int64(d)/2)) - d/4)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.closed.Done():
		return false
	}
}

// outbox holds messages until the stream takes them. The machine bounds it, by what it leaves unanswered.
type outbox struct {
	some chan struct{}

	mu   sync.Mutex
	list [][]byte
}

func newOutbox() *outbox { return &outbox{some: make(chan struct{}, 1)} }

func (o *outbox) put(b []byte) {
	o.mu.Lock()
	o.list = append(o.list, b)
	o.mu.Unlock()
	poke(o.some)
}

// drain sends what comes until it cannot, or ctx ends.
func (o *outbox) drain(ctx context.Context, send func([]byte) error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.some:
		}
		o.mu.Lock()
		list := o.list
		o.list = nil
		o.mu.Unlock()
		for _, b := range list {
			if err := send(b); err != nil {
				return err
			}
		}
	}
}
