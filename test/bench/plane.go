package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
)

var trustDomain = spiffeid.RequireTrustDomainFromString("bench.test")

// planeConfig is what the control plane's process is told first.
type planeConfig struct {
	Shape   string       `json:"shape"`
	N       int          `json:"n"`
	Listen  string       `json:"listen"` // host:port; port 0: any
	CA      ca.Material  `json:"ca"`
	History []stepParcel `json:"history"` // what has changed of the objects that the shape has
	Profile string       `json:"profile"` // folder for a profile of how the objects are taken over; "": none

	// Kubeconfig is of an API server that has the objects; "": they are made here, and changes are handed over.
	Kubeconfig string `json:"kubeconfig"`

	IndexOnly bool `json:"index_only"` // compile, and serve nobody
}

// command is what it is told later, and reply what it answers to each. A change is prepared first, so that reading it is not measured.
type command struct {
	Op      string       `json:"op"` // "prepare", "write", "pace", "backlog", "settle", "memory", "profile", "stop-profile"
	Steps   []stepParcel `json:"steps"`
	Profile string       `json:"profile"` // folder
	Name    string       `json:"name"`    // of the profile
}

type stepParcel struct {
	Applied []parcel `json:"applied"`
	Deleted []parcel `json:"deleted"`
}

type reply struct {
	Error   string        `json:"error"`
	Address string        `json:"address"`
	At      time.Duration `json:"at"`   // when the last write of a change began
	Took    time.Duration `json:"took"` // from there until the control plane had published
	Load    time.Duration `json:"load"` // from the objects to everything compiled and rendered
	LoadCPU time.Duration `json:"load_cpu"`
	Figures figures       `json:"figures"`
	RSS     int64         `json:"rss"` // bytes
	Pace    pace          `json:"pace"`
	Backlog int           `json:"backlog"`
}

// runPlane is the process of the control plane: commands in, one reply to each out.
func runPlane(in io.Reader, out io.Writer) error {
	commands, replies := json.NewDecoder(in), json.NewEncoder(out)
	var c planeConfig
	if err := commands.Decode(&c); err != nil {
		return err
	}
	controlplane.LimitGarbage()
	if c.IndexOnly {
		r, err := runIndex(c)
		if err != nil {
			r.Error = err.Error()
		}
		return replies.Encode(r)
	}
	p, err := newPlane(c)
	if err != nil {
		return replies.Encode(reply{Error: err.Error()})
	}
	defer p.close()
	if err := replies.Encode(reply{Address: p.listener.Addr().String(), At: clock(), Load: p.loaded, LoadCPU: p.loadCPU, Figures: p.figures()}); err != nil {
		return err
	}
	for {
		var c command
		if err := commands.Decode(&c); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		r, err := p.do(c)
		if err != nil {
			r.Error = err.Error()
		}
		if err := replies.Encode(r); err != nil {
			return err
		}
	}
}

type plane struct {
	*controlplane.ControlPlane
	listener net.Listener
	stop     func()
	loaded   time.Duration
	loadCPU  time.Duration
	profile  profile
	prepared change
}

func config() controlplane.Config {
	return controlplane.Config{Policy: policy.Config{TrustDomain: trustDomain, PodNetwork: podNetwork}, ServiceNetwork: serviceNetwork}
}

func newPlane(c planeConfig) (*plane, error) {
	authority, err := ca.Load(ca.Config{TrustDomain: trustDomain}, c.CA)
	if err != nil {
		return nil, err
	}
	p := &plane{}
	if c.Kubeconfig != "" {
		return p, p.watch(c, authority)
	}
	objects, err := c.objects()
	if err != nil {
		return nil, err
	}
	return p, p.serve(c, authority, func(cp *controlplane.ControlPlane) error { return cp.Load(objects) })
}

// objects makes them here: they need not be brought, and no world beside them stays in the memory that is measured.
func (c planeConfig) objects() (*policy.Objects, error) {
	w, err := newWorld(c.Shape, c.N)
	if err != nil {
		return nil, err
	}
	steps, err := unparcel(c.History)
	if err != nil {
		return nil, err
	}
	w.take(steps)
	return w.all(), nil
}

func (p *plane) close() { p.stop() }

func (p *plane) do(c command) (r reply, err error) {
	switch c.Op {
	case "prepare":
		p.prepared, err = unparcel(c.Steps)
	case "write":
		r.At = clock()
		for _, s := range p.prepared {
			r.At = clock()
			if err := p.Update(s.applied, s.deleted); err != nil {
				return r, err
			}
		}
		r.Took = clock() - r.At
	case "pace":
		r.Pace, err = keepPace(p.prepared, func(s step) error { return p.Update(s.applied, s.deleted) }, func() (int, error) { return p.backlog(), nil })
		r.At = clock()
	case "backlog":
		r.Backlog = p.backlog()
	case "settle":
		r.Figures, err = p.settle()
	case "memory":
		r.RSS, err = readRSS()
	case "profile":
		p.profile, err = startProfile(c.Profile, c.Name)
	case "stop-profile":
		err = p.profile.stop()
	default:
		return r, fmt.Errorf("command %q: there is no such thing", c.Op)
	}
	return r, err
}

// unanswered is how many looks without any change say that responses will not be answered any more: their streams have ended.
const unanswered = 400

// settle waits until nothing is on its way any more: there is an answer for each response, and three looks in a row find the same counts. It is
// done in here: to be asked again and again would cost more than some changes do.
func (p *plane) settle() (figures, error) {
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	var last figures
	same := 0
	for began := clock(); clock()-began < patience; <-look.C {
		f := p.figures()
		if f.Responses == last.Responses && f.Answers == last.Answers {
			same++
		} else {
			same = 0
		}
		if last = f; same >= 3 && f.Answers == f.Responses || same == unanswered {
			return f, nil
		}
	}
	return last, fmt.Errorf("%d responses and %d answers after %s: they do not come to rest", last.Responses, last.Answers, patience)
}

func unparcel(list []stepParcel) (change, error) {
	var out change
	for _, s := range list {
		applied, err := unpack(s.Applied)
		if err != nil {
			return nil, err
		}
		deleted, err := unpack(s.Deleted)
		if err != nil {
			return nil, err
		}
		out = append(out, step{applied, deleted})
	}
	return out, nil
}

// tokens attests pods by tokens that name them: asking an API server is not what is measured.
type tokens struct{}

func tokenOf(p sidecarPod) string { return p.namespace + "/" + p.name + "/" + p.uid }

func (tokens) Attest(_ context.Context, token string) (attest.Pod, error) {
	parts := strings.Split(token, "/")
	if len(parts) != 3 {
		return attest.Pod{}, fmt.Errorf("%w: it does not name a pod", attest.ErrRefused)
	}
	return attest.Pod{Namespace: parts[0], Name: parts[1], UID: parts[2]}, nil
}
