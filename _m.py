import sys, json, time, torch
from pathlib import Path
import lib_fusion.training.evaluate as ev
import demo.assess as A
torch.set_num_threads(1)
L=Path.home()/'lab/afa'; D=Path('demo'); DATA=Path.home()/'lab/data'
ENS={'2':('afa-animals-vehicles',('animals','vehicles')),'3':('afa-animals-vehicles-food',('animals','vehicles','food'))}
which=sys.argv[1]; N,names=ENS[sys.argv[2]]
paths=[D/f'{n}.safetensors' for n in names]
t0=time.monotonic()
if which=='eval':
    real=ev.Cache
    class Few(real):
        def __init__(s,f):
            super().__init__(f); n=0; keep=[]; c={}
            for e in s.entries:
                c[e.subset]=c.get(e.subset,0)+1
                if c[e.subset]<=(24 if e.subset=='scenes' else 8): keep.append(e)
            s.entries=keep
    ev.Cache=Few
    r=ev.evaluate(L/f'dev0/{N}-held-out-cache',paths,D/f'{N}.safetensors',(150,400,650))
    print(ev.write_report(r,L/f'eval-{N}',f'{N}, held out'))
elif which=='singles':
    cap=int(sys.argv[3]); only=sys.argv[4:]
    engine_scorer=A.Scorer(A.reference_latents(A.load_engine('general'),DATA))
    for name,(models,fusion) in A.methods().items():
        if name not in only: continue
        engine=A.load_engine(*models); out={}
        for cat in names:
            keys=[(n,s) for n in A.CATEGORIES[cat] for s in A.STYLES][::48//cap][:cap]
            z=A.draw(engine,[A.single_caption(*k) for k in keys],range(len(keys)),(128,128),4.0,fusion)
            hits=[engine_scorer.nearest(x,s)%len(A.CONCEPTS)==A.CONCEPTS.index(n) for x,(n,s) in zip(z,keys)]
            out[cat]=(sum(hits)/len(keys), sum(engine_scorer.rms(x,n,s) for x,(n,s) in zip(z,keys))/len(keys))
        print('SINGLES',name,len(keys),out,f'{time.monotonic()-t0:.0f}s',flush=True)
elif which=='scenes':
    pairs=int(sys.argv[3]); steps=int(sys.argv[4]); only=sys.argv[5:]
    t=A.assess_scenes(DATA,pairs,A.SEEDS[:1],(4.0,),only,steps)
    print('SCENES',pairs,steps,json.dumps({k:v['all'] for k,v in t['4'].items()}),f'{time.monotonic()-t0:.0f}s',flush=True)
